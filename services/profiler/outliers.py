"""Repetitions that tell of the machine's hiccups rather than of the operation are left out and counted. Pure.

Source: the modified z-score (Iglewicz and Hoaglin, 1993), here of durations relative to their median.
"""

import statistics
from collections.abc import Sequence

#: Median absolute deviations of a normal distribution in one standard deviation.
_SIGMA_IN_MADS = 1.4826
#: So many standard deviations from the median is far. A slow tail is part of what serving will see, so this is wide.
_FAR_SIGMAS = 6.0
#: Below so many repetitions nobody can say which of them is the odd one.
_FEWEST = 4
#: When more than this share is far from the median, they are not accidents: the operation has two speeds.
_MOST_SHARE = 0.25
#: Clocks have steps: equal repetitions do not make every other one far.
_LEAST_SPREAD = 0.01


def spread_of(durations_s: Sequence[float]) -> float:
    """Robust standard deviation relative to the median."""
    middle_s = statistics.median(durations_s)
    mad_s = statistics.median(abs(duration - middle_s) for duration in durations_s)
    return _SIGMA_IN_MADS * mad_s / middle_s


def without_outliers(points: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    """Repetitions of every point of one operation without those far from the point's median; order is kept.

    points: durations in seconds, all positive. How far is far depends on the spread of the point and of the operation,
    whichever is larger: few repetitions may lie close together by chance.
    """
    known = [spread_of(durations) for durations in points if len(durations) >= _FEWEST]
    if not known:
        return [tuple(durations) for durations in points]
    common = max(statistics.median(known), _LEAST_SPREAD)
    return [_without(durations, common) for durations in points]


def _without(durations_s: Sequence[float], common: float) -> tuple[float, ...]:
    if len(durations_s) < _FEWEST:
        return tuple(durations_s)
    middle_s = statistics.median(durations_s)
    far_s = _FAR_SIGMAS * max(common, spread_of(durations_s)) * middle_s
    kept = tuple(duration for duration in durations_s if abs(duration - middle_s) <= far_s)
    if len(durations_s) - len(kept) > _MOST_SHARE * len(durations_s):
        return tuple(durations_s)
    return kept
