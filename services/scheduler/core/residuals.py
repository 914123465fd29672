"""How far predictions are from what happens: running quantiles and mean errors of constant size."""

import math

from services.latency import LatencyModel

#: Gain of the running mean errors; of so many observations it is their plain mean.
_GAIN = 0.02
_PLAIN = 50
#: Step of the quantiles in standard deviations.
_STEP = 0.1
_TAIL = 0.05
_BODY = 1.0 - _TAIL
#: Width of the 90 % interval of a normal distribution in standard deviations.
_WIDTH_90 = 3.29
_LEAST_SIGMA = 0.02
#: Half width of the interval to begin with where the profile tells none, and the least lower end.
_UNKNOWN, _LOWEST = 0.13, -0.9


class MeanError:
    """Running mean of |predicted - real| / real, a fraction, and the number of observations."""

    __slots__ = ("count", "value")

    def __init__(self) -> None:
        self.count = 0
        self.value = 0.0

    def observe(self, error: float) -> None:
        """Take one error in."""
        self.count = count = self.count + 1
        self.value += (_GAIN if count > _PLAIN else 1.0 / count) * (error - self.value)


class Residuals:
    """Running 5 % and 95 % quantiles (`low`, `high`) of log(real / predicted), by stochastic approximation.

    They begin with those of the profile. An observation moves a quantile by its step, however far out it is.
    """

    __slots__ = ("high", "low", "sigma")

    def __init__(self, model: LatencyModel) -> None:
        known = model.residual_p5 < model.residual_p95
        self.low = math.log1p(max(model.residual_p5, _LOWEST) if known else -_UNKNOWN)
        self.high = math.log1p(model.residual_p95 if known else _UNKNOWN)
        #: Standard deviation of a normal distribution with that 90 % interval.
        self.sigma = max(_LEAST_SIGMA, (self.high - self.low) / _WIDTH_90)

    def observe(self, residual: float) -> None:
        """Take one log(real / predicted) in."""
        step = _STEP * self.sigma
        low, high = self.low, self.high
        high += step * _BODY if residual > high else -step * _TAIL
        low -= step * _BODY if residual < low else -step * _TAIL
        if low > high:
            low = high = 0.5 * (low + high)
        self.low, self.high = low, high
        sigma = (high - low) / _WIDTH_90
        self.sigma = sigma if sigma > _LEAST_SIGMA else _LEAST_SIGMA
