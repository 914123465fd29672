"""What every part of a policy is worth: the policy without it."""

from bench.paper.config import BASELINE, SUBJECT, PaperConfig
from bench.paper.family import Labelled
from bench.paper.variants import everywhere, side_by_side

_Options = tuple[tuple[str, float | int | bool], ...]
#: No stress that any request could have opens a node.
_NEVER = 1e9
_PAPER: dict[str, _Options] = {"no profile": (("profile", False),), "no hold-back": (("hold_back", False),)}
_LEMIX: dict[str, _Options] = {
    "training not cut": (("cut", 0.0),),
    "requests open no node": (("open_at", _NEVER),),
    "requests not packed": (("slo_fraction", 0.0),),
    "training on all nodes": (("backlog_s", 0.0),),
}
PARTS: dict[str, dict[str, _Options]] = {
    "paper_additive": _PAPER,
    "paper_ratio": _PAPER,
    "paper_released": _PAPER,
    SUBJECT: _LEMIX,
}


def runs(config: PaperConfig) -> list[Labelled]:
    """Every policy in full and without each part."""
    variants: list[tuple[str, str, _Options]] = [(BASELINE, BASELINE, ())]
    for policy, parts in PARTS.items():
        variants += [(policy, policy, ()), *((f"{policy}, {name}", policy, options) for name, options in parts.items())]
    return [
        labelled
        for label, policy, options in variants
        for labelled in everywhere(
            label, config.axis_points(), config.first_seed, config.num_tasks, policy, options=options
        )
    ]


ABLATION = side_by_side(
    "ablation",
    "Ablation",
    "Policies without one of their parts. <i>No profile</i>: every task is taken to last the same time. <i>No "
    "hold-back</i>: training never waits for serving.",
    runs,
)
