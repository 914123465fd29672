"""Figures, their targets and what decides. Pure."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.report.verdict import decide


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure with every sample behind it. `target` None: reported beside the others, without a verdict."""

    name: str
    unit: str
    samples: tuple[float, ...]
    target: float | None = None
    at_least: bool = True

    @property
    def median(self) -> float:
        """Middle of the samples."""
        return statistics.median(self.samples)

    @property
    def met(self) -> bool | None:
        """Whether the median is on the right side of the target."""
        if self.target is None:
            return None
        return self.median >= self.target if self.at_least else self.median <= self.target

    @property
    def verdict(self) -> str:
        """held or missed; unresolved when the middle half of the samples spans the target."""
        if self.target is None:
            return ""
        low, high = quartiles(self.samples)
        return decide((low, high), self.target, at_least=self.at_least)

    def as_json(self) -> dict[str, Any]:
        """For the summary."""
        low, high = quartiles(self.samples)
        return {
            **asdict(self),
            "median": self.median,
            "quartiles": [low, high],
            "met": self.met,
            "verdict": self.verdict,
        }

    def as_row(self) -> tuple[str, ...]:
        """For the terminal: name, median, quartiles, target, verdict."""
        low, high = quartiles(self.samples)
        target = "" if self.target is None else f"{'>=' if self.at_least else '<='} {self.target:g}"
        return (
            self.name,
            f"{self.median:,.4g} {self.unit}".strip(),
            f"{low:,.4g} to {high:,.4g}",
            str(len(self.samples)),
            target,
            self.verdict,
        )


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """First and third; of a single sample that sample."""
    if len(samples) == 1:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, ...]:
    """Of the two of each pair, measured one right after the other."""
    return tuple(a / b for a, b in zip(ours, theirs, strict=True))
