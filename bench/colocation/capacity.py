"""How much traffic a cluster can serve. Pure."""

from collections.abc import Callable
from dataclasses import dataclass

#: Rates below this are no cluster's capacity: the promise is broken on an idle one.
_LEAST_RATE = 0.125


@dataclass(frozen=True, slots=True)
class Capacity:
    """Highest rate looked at that is served, requests/s (0: none), and every rate with its attainment."""

    rate: float
    probes: tuple[tuple[float, float], ...]


def find_capacity(attainment_at: Callable[[float], float], wanted: float, tolerance: float) -> Capacity:
    """Doubles the rate until the attainment is below `wanted`, then halves the interval down to `tolerance` of it."""
    probes: dict[float, float] = {}

    def serves(rate: float) -> bool:
        probes[rate] = attainment_at(rate)
        return probes[rate] >= wanted

    low, high = 0.0, 1.0
    while serves(high):
        low, high = high, 2.0 * high
    while not low and high > _LEAST_RATE:
        high /= 2.0
        if serves(high):
            low, high = high, 2.0 * high
    while low and high - low > tolerance * high:
        middle = (low + high) / 2.0
        if serves(middle):
            low = middle
        else:
            high = middle
    return Capacity(low, tuple(sorted(probes.items())))
