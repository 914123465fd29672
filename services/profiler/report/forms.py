"""What the page says of the forms: what each is, and how one is chosen."""

from collections.abc import Sequence

from lemix.internal.v1 import profile_pb2
from services.charts.page import facts
from services.charts.svg import text
from services.latency import TABULATED
from services.profiler.fit import PARSIMONY, TABLE_GAIN, TABLE_MARGIN

_MEANINGS = {
    "quadratic": "eta·C·l²: the paper's",
    "affine": "a + b·C·l: a fixed part and one per token",
    "full": "a + b·C·l + c·C·l²: affine, and attention over long sequences",
    "full_decode": "a + b·C + c·C·l: a fixed part, one per sequence and one per token of context",
    "constant": "a: the same whatever is computed",
    TABULATED: "the grid of medians itself, with straight lines between its points",
}


def choice(fits: Sequence[profile_pb2.LatencyFit]) -> str:
    """What the forms of a profile are and how one is chosen."""
    used = {fit.model for fit in fits}
    return (
        "<p class='soft'>Forms, in seconds, for C sequences of l tokens (of context, for decode):</p>"
        + facts({form: meaning for form, meaning in _MEANINGS.items() if form in used})
        + "<p class='soft'>The form in bold is the one used: that of the smallest held-out error, but one with more "
        f"freedom must win clearly. More coefficients must lower the error by {100.0 * PARSIMONY:.0f} % of it; a table "
        f"by {100.0 * TABLE_MARGIN:.0f} % of it and {100.0 * TABLE_GAIN:.1f} percentage points, on the points inside "
        "its grid, because beyond its grid it only goes on straight.</p>"
    )


def passed_over(fits: Sequence[profile_pb2.LatencyFit]) -> str:
    """Why a form of smaller held-out error than the chosen one is not used; nothing without any."""
    chosen = next((fit for fit in fits if fit.chosen), None)
    better = [fit.model for fit in fits if chosen is not None and fit.mape < chosen.mape]
    if chosen is None or not better:
        return ""
    names = text(" and ".join(better))
    return (
        f"<p class='soft'>Not chosen despite a smaller held-out error: {names}. The gain over {text(chosen.model)} is "
        "less than the extra freedom asks for.</p>"
    )
