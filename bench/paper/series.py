"""Rows put together for charts and trends. Pure."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]


def geomean(values: Iterable[float]) -> float:
    """Of positive values."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows by a key, in order."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def over_seeds(values: Iterable[float | None]) -> dict[str, float] | None:
    """Smallest, median and largest; None without values."""
    known = [value for value in values if value is not None]
    return {"low": min(known), "median": statistics.median(known), "high": max(known)} if known else None
