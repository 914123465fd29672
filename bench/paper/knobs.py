"""Knobs of the policies and the values they are tried at."""

from collections.abc import Mapping
from typing import NamedTuple

from bench.paper.config import SUBJECT


class Knob(NamedTuple):
    """An option, what it is when nothing is said, and values of which that is one."""

    name: str
    default: float
    values: tuple[float, ...]

    def options(self, value: float) -> tuple[tuple[str, float], ...]:
        """None for the default: that run is simulated already."""
        return () if value == self.default else ((self.name, value),)


_PAPER = (
    Knob("lambda_1", 0.15, (0.015, 0.05, 0.15, 0.5, 1.5)),
    Knob("lambda_2", 0.05, (0.005, 0.02, 0.05, 0.2, 0.5)),
    Knob("tau_s", 0.2, (0.02, 0.07, 0.2, 0.7, 2.0)),
)
OPEN_AT = Knob("open_at", 1.0, (0.5, 0.75, 1.0, 1.5, 2.0))
CONSISTENCY = Knob("consistency", 0.0, (0.0, 0.25, 0.5, 1.0, 2.0))
#: By policy.
KNOBS: Mapping[str, tuple[Knob, ...]] = {
    SUBJECT: (
        Knob("slo_fraction", 0.5, (0.1, 0.3, 0.5, 0.7, 0.9)),
        OPEN_AT,
        Knob("dwell_s", 1.0, (0.25, 0.5, 1.0, 2.0, 4.0)),
        Knob("backlog_s", 12.0, (3.0, 6.0, 12.0, 24.0, 48.0)),
        Knob("cut", 0.5, (0.25, 0.5, 1.0, 2.0, 4.0)),
        CONSISTENCY,
    ),
    "paper_additive": _PAPER,
    "paper_ratio": _PAPER,
}
