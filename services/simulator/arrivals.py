"""When tasks arrive: seeded point processes. Rates are tasks per second; times start at 0."""

import math
from collections.abc import Callable, Iterator
from random import Random


def poisson(random: Random, rate: float) -> Iterator[float]:
    """Independent arrivals."""
    return bursty(random, rate, cv=1.0)


def bursty(random: Random, rate: float, *, cv: float) -> Iterator[float]:
    """Gamma distributed gaps with coefficient of variation `cv` (1: Poisson; larger: clumps)."""
    _check(rate=rate, cv=cv)
    shape = 1.0 / (cv * cv)
    scale = 1.0 / (rate * shape)
    time_s = 0.0
    while True:
        time_s += random.gammavariate(shape, scale)
        yield time_s


def alternating(random: Random, low_rate: float, high_rate: float, *, period_s: float) -> Iterator[float]:
    """Poisson arrivals whose rate changes between low and high every half period, beginning low."""
    _check(low_rate=low_rate, high_rate=high_rate, period_s=period_s)

    def rate_at(time_s: float) -> float:
        return low_rate if (time_s % period_s) < period_s / 2 else high_rate

    return _thinned(random, max(low_rate, high_rate), rate_at)


def daily(random: Random, mean_rate: float, *, swing: float, day_s: float = 86_400.0) -> Iterator[float]:
    """Poisson arrivals whose rate follows a day: mean * (1 + swing * sin). swing 0-1."""
    _check(mean_rate=mean_rate, day_s=day_s)
    if not 0.0 <= swing <= 1.0:
        raise ValueError(f"swing must be within 0-1, got {swing}")

    def rate_at(time_s: float) -> float:
        return mean_rate * (1.0 + swing * math.sin(2.0 * math.pi * time_s / day_s))

    return _thinned(random, mean_rate * (1.0 + swing), rate_at)


def _thinned(random: Random, highest_rate: float, rate_at: Callable[[float], float]) -> Iterator[float]:
    """Lewis and Shedler's thinning of a Poisson process."""
    time_s = 0.0
    while True:
        time_s += random.expovariate(highest_rate)
        if random.random() * highest_rate < rate_at(time_s):
            yield time_s


def _check(**values: float) -> None:
    for name, value in values.items():
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value}")
