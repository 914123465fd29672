"""Durations on a grid of batches and lengths, for engines whose time goes in steps."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Durations in seconds, row by row: all lengths of the first batch, then of the second.

    batches: rising, sequences. lengths: rising, tokens per sequence. Raises ValueError for a table that is none.
    """

    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    durations_s: tuple[float, ...]

    def __post_init__(self) -> None:
        for name, axis in (("batches", self.batches), ("lengths", self.lengths)):
            if not axis or axis[0] < 1 or any(low >= high for low, high in pairwise(axis)):
                raise ValueError(f"{name} of a latency table must rise from at least 1, got {list(axis)}")
        expected = len(self.batches) * len(self.lengths)
        if len(self.durations_s) != expected:
            raise ValueError(f"a latency table of {expected} points has {len(self.durations_s)} durations")
        if not all(math.isfinite(value) and value > 0.0 for value in self.durations_s):
            raise ValueError("a duration of a latency table is not a positive number")

    def at_s(self, batch: float, length: float) -> float:
        """Bilinear between the points; beyond them the outermost cell goes on linearly.

        Beyond the grid it never falls: noise in the outermost cell does not make large operations free. Below it, never
        under the straight line to zero, so a small operation is short but not free. An axis with one value says nothing
        about others: they take the same.
        """
        row, above = _cell(self.batches, batch)
        column, right = _cell(self.lengths, length)
        low = self._along(row, column, right)
        if above:
            low += above * (self._along(row + 1, column, right) - low)
        edge = min(batch, self.batches[-1]), min(length, self.lengths[-1])
        if edge != (batch, length):
            low = max(low, self.at_s(*edge))
        first_batch, first_length = self.batches[0], self.lengths[0]
        if batch >= first_batch and length >= first_length:
            return low
        least = min(1.0, batch / first_batch) * min(1.0, length / first_length) * self.durations_s[0]
        return max(low, least, 0.0)

    def _along(self, row: int, column: int, right: float) -> float:
        index = row * len(self.lengths) + column
        value = self.durations_s[index]
        return value + right * (self.durations_s[index + 1] - value) if right else value


def _cell(axis: Sequence[int], value: float) -> tuple[int, float]:
    """Index of the grid value where the cell begins, and how far into the cell; outside the grid the last cell."""
    if len(axis) == 1:
        return 0, 0.0
    index = min(max(bisect_right(axis, value) - 1, 0), len(axis) - 2)
    return index, (value - axis[index]) / (axis[index + 1] - axis[index])
