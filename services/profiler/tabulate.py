"""Tables of an operation's durations, and what they would have said of each of their points. Pure.

For engines whose time goes in steps, which no polynomial follows.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from services.latency import LatencyModel, LatencyTable

#: (batch, length) -> seconds.
Medians: TypeAlias = Mapping[tuple[int, int], float]

#: Points along an axis that interpolation needs to be better than a straight line.
_FEWEST = 3


def tabulate(medians: Medians, smooth: LatencyModel) -> LatencyTable | None:
    """The grid of medians; None when there are too few lengths, or they say nothing of other batches.

    A grid ends where operations become too large, so it lacks its far corner. What lacks there is what the polynomial
    `smooth` predicts, times what the nearest measured point of its row took more than predicted.
    """
    batches = sorted({batch for batch, _ in medians})
    lengths = sorted({length for _, length in medians})
    if len(lengths) < _FEWEST or 2 * len(medians) < len(batches) * len(lengths):
        return None
    if len(batches) == 1 and batches[0] > 1:
        return None
    durations = [_cell(medians, smooth, batch, length) for batch in batches for length in lengths]
    if min(durations) <= 0.0:
        return None
    return LatencyTable(tuple(batches), tuple(lengths), tuple(durations))


def _cell(medians: Medians, smooth: LatencyModel, batch: int, length: int) -> float:
    if (batch, length) in medians:
        return medians[batch, length]
    near = min(medians, key=lambda point: (point[0] != batch, abs(np.log(point[1] / length)), -point[0]))
    predicted_s = smooth.predict_s(*near)
    return smooth.predict_s(batch, length) * medians[near] / predicted_s if predicted_s > 0.0 else 0.0


def between(medians: Medians, batch: int, length: int) -> float | None:
    """Duration at a point of the grid from its neighbours along both axes; None at a corner, where there are none."""
    row = {other: value for (b, other), value in medians.items() if b == batch}
    column = {other: value for (other, n), value in medians.items() if n == length}
    found = [value for value in (_inside(row, length), _inside(column, batch)) if value is not None]
    return sum(found) / len(found) if found else None


def _inside(values: Mapping[int, float], at: int) -> float | None:
    others = sorted(other for other in values if other != at)
    if len(others) < 2 or not others[0] < at < others[-1]:
        return None
    return float(np.interp(at, others, [values[other] for other in others]))


def held_out_s(medians: Medians, table: LatencyTable, points: Sequence[tuple[int, int, int]]) -> list[float | None]:
    """What the table says of every (batch, length, cached) without having seen it; None where it cannot tell."""
    model = LatencyModel("tabulated", (), table=table)
    return [
        model.predict_s(batch, length, cached) if cached else between(medians, batch, length)
        for batch, length, cached in points
    ]
