"""A results table: one row per policy, the same figures on the terminal and on the page. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Column:
    """One figure per policy. `better`: "high", "low" or "" when neither is."""

    title: str
    help: str
    path: tuple[str, ...]
    format: Callable[[float], str]
    better: str = ""

    def value(self, metrics: Mapping[str, Any]) -> Any:
        """The number (or [min, max]) in a policy's metrics; None when it was not measured."""
        found: Any = metrics
        for key in self.path:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    def best(self, policies: Mapping[str, Mapping[str, Any]]) -> str | None:
        """The policy with the best value; None when there is no order, no comparison, or a tie as it is shown."""
        values = {name: self.value(metrics) for name, metrics in policies.items()}
        known = {name: value for name, value in values.items() if isinstance(value, int | float)}
        if not self.better or len(known) < 2:
            return None
        found = (max if self.better == "high" else min)(known, key=lambda name: known[name])
        shown = [self.format(value) for value in known.values()]
        return found if shown.count(self.format(known[found])) == 1 else None


def percent(value: float) -> str:
    """A share."""
    return f"{100 * value:.1f} %"


def two(value: float) -> str:
    """Two decimals."""
    return f"{value:.2f}"


def one(value: float) -> str:
    """One decimal."""
    return f"{value:.1f}"


def whole(value: float) -> str:
    """No decimals."""
    return f"{value:,.0f}"


def cell(column: Column, metrics: Mapping[str, Any]) -> str:
    """A value as text; a [min, max] pair as a range; a dash for what was not measured."""
    value = column.value(metrics)
    if isinstance(value, list):
        return f"{column.format(value[0])} – {column.format(value[1])}"
    return "–" if value is None else column.format(value)
