"""How much traffic a cluster can serve. Pure."""

from collections.abc import Callable
from dataclasses import dataclass

#: Rates below this are no cluster's capacity: the promise is broken on an idle one.
_LEAST_RATE = 0.125
#: Short runs tell a capacity to within this share of it, before long ones are made.
_COARSE = 0.15
#: A rate counts as served by a short run that misses so much more: a few requests decide it, and attainment need not
#: fall evenly. So the long runs come from above and meet the highest rate that is served.
_SLACK = 0.03
#: The next rate of the long runs is so many times higher or lower, until one is served and one is not.
_STEP = 1.1


@dataclass(frozen=True, slots=True)
class Capacity:
    """Highest rate looked at that is served, requests/s (0: none), and every rate of the long runs with its attainment,
    which of one that is not served may be an upper bound."""

    rate: float
    probes: tuple[tuple[float, float], ...]


def find_capacity(
    glance_at: Callable[[float], float], attainment_at: Callable[[float], float], wanted: float, tolerance: float
) -> Capacity:
    """Short runs find where the attainment falls well below `wanted`, long ones the capacity to `tolerance` of it.

    glance_at, attainment_at: attainment at a rate, of a short run and of long ones.
    """
    probes: dict[float, float] = {}

    def serves(rate: float) -> bool:
        probes[rate] = attainment_at(rate)
        return probes[rate] >= wanted

    def may_serve(rate: float) -> bool:
        return glance_at(rate) >= wanted - _SLACK

    low, high = _bracket(may_serve, 1.0, 2.0)
    low, high = _halved(may_serve, low, high, _COARSE)
    low, high = _bracket(serves, low or high, _STEP)
    low, _ = _halved(serves, low, high, tolerance)
    return Capacity(low, tuple(sorted(probes.items())))


def _bracket(serves: Callable[[float], bool], rate: float, step: float) -> tuple[float, float]:
    """(a rate that is served, a higher one that is not), `step` apart; (0, rate) where nothing is served."""
    if serves(rate):
        while serves(step * rate):
            rate *= step
        return rate, step * rate
    while rate / step >= _LEAST_RATE:
        rate /= step
        if serves(rate):
            return rate, step * rate
    return 0.0, rate


def _halved(serves: Callable[[float], bool], low: float, high: float, tolerance: float) -> tuple[float, float]:
    """The interval, halved down to `tolerance` of its upper end."""
    while low and high - low > tolerance * high:
        middle = (low + high) / 2.0
        if serves(middle):
            low = middle
        else:
            high = middle
    return low, high
