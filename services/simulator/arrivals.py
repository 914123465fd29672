"""When tasks arrive: seeded point processes. Rates are tasks per second; times start at 0."""

import math
from collections.abc import Callable, Iterator
from random import Random

DAY_S = 86_400.0
#: Halvings of a day when the time of an arrival is looked for: to the microsecond.
_HALVINGS = 40


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


def daily(random: Random, mean_rate: float, *, swing: float, cv: float = 1.0, day_s: float = DAY_S) -> Iterator[float]:
    """Gamma distributed gaps (cv 1: Poisson) at a rate that follows a day: mean * (1 + swing * sin). swing 0-1."""
    _check(mean_rate=mean_rate, day_s=day_s)
    if not 0.0 <= swing <= 1.0:
        raise ValueError(f"swing must be within 0-1, got {swing}")
    # The process runs on a clock of its own, which goes faster by day.
    steady = bursty(random, mean_rate, cv=cv)
    return (_at_s(mean_s, swing, day_s) for mean_s in steady) if swing else steady


def _at_s(mean_s: float, swing: float, day_s: float) -> float:
    """The time by which a rate of 1 * (1 + swing * sin) has brought what a rate of 1 brings in `mean_s`."""
    days, rest_s = divmod(mean_s, day_s)
    low_s, high_s = 0.0, day_s
    for _ in range(_HALVINGS):
        middle_s = (low_s + high_s) / 2
        turn = 2.0 * math.pi * middle_s / day_s
        if middle_s + swing * day_s / (2.0 * math.pi) * (1.0 - math.cos(turn)) < rest_s:
            low_s = middle_s
        else:
            high_s = middle_s
    return days * day_s + (low_s + high_s) / 2


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
