"""What it costs that durations vary and that the scheduler's latency models are wrong."""

from typing import Any

from bench.paper.config import BASELINE, SUBJECT, PaperConfig
from bench.paper.family import Labelled
from bench.paper.table import COLUMNS
from bench.paper.variants import everywhere, side_by_side

_ERROR = 0.1
_KINDS: dict[str, dict[str, Any]] = {
    "": {},
    ", durations ±10 %": {"noise": _ERROR},
    ", models ±10 %": {"belief_error": _ERROR},
    ", both": {"noise": _ERROR, "belief_error": _ERROR},
}
#: The bound holds for exact durations only.
_COLUMNS = [column for column in COLUMNS if column.title != "share of bound"]


def runs(config: PaperConfig) -> list[Labelled]:
    """LeMix with exact knowledge and without."""
    points, seeds = config.axis_points(), config.first_seed
    found = everywhere(BASELINE, points, seeds, config.num_tasks, BASELINE)
    for kind, changes in _KINDS.items():
        found += everywhere(f"{SUBJECT}{kind}", points, seeds, config.num_tasks, SUBJECT, **changes)
    return found


NOISE = side_by_side(
    "noise",
    "Wrong predictions",
    "<i>Durations</i>: every operation takes its modelled time times a normal factor with standard deviation 10 %. "
    "<i>Models</i>: the scheduler believes latencies that are wrong by a lognormal factor per node, 10 % wide, which "
    "traces correct. All against separate clusters with exact durations.",
    runs,
    columns=_COLUMNS,
)
