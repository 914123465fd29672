"""Latency of one operation on one stage as a function of batch and length.

Source: paper section 4 (quadratic form); the richer forms are LeMix's own, because fused attention and short,
memory-bound sequences do not follow a square law.
"""

import math
from dataclasses import dataclass

from services.latency.table import LatencyTable

#: Quantile of the standard normal distribution that bounds a 90 % interval.
_SIGMAS_OF_90 = 1.645
#: A model with wider residuals says nothing about single operations.
_MOST_NOISE = 0.5

TABULATED = "tabulated"


def _quadratic(batch: float, length: float, cached: float = 0.0) -> tuple[float, ...]:
    return (batch * length * (length + 2.0 * cached),)


def _affine(batch: float, length: float, cached: float = 0.0) -> tuple[float, ...]:
    del cached
    return (1.0, batch * length)


def _full(batch: float, length: float, cached: float = 0.0) -> tuple[float, ...]:
    return (1.0, batch * length, batch * length * (length + 2.0 * cached))


def _full_decode(batch: float, length: float, cached: float = 0.0) -> tuple[float, ...]:
    del cached
    return (1.0, batch, batch * length)


def _constant(batch: float, length: float, cached: float = 0.0) -> tuple[float, ...]:
    del batch, length, cached
    return (1.0,)


#: Form name -> features of (batch, length, cached); a duration is the dot product with the coefficients.
#: `quadratic` is the paper's. Decode's length is the mean context per sequence. Behind `cached` tokens what grows with
#: the square of the length costs (cached + length)^2 - cached^2.
FORMS = {
    "quadratic": _quadratic,
    "affine": _affine,
    "full": _full,
    "full_decode": _full_decode,
    "constant": _constant,
}


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """A fitted form: one of FORMS with its coefficients, or "tabulated" with a table.

    mape: mean absolute error on held-out points (a fraction). residual_p5, residual_p95: 5 % and 95 % quantiles of
    measured / predicted - 1 over repetitions of held-out points; 0 when nothing is known of them.
    """

    form: str
    coefficients: tuple[float, ...]
    mape: float = 0.0
    residual_p5: float = 0.0
    residual_p95: float = 0.0
    table: LatencyTable | None = None

    def __post_init__(self) -> None:
        if (self.form == TABULATED) != (self.table is not None):
            raise ValueError(f"form {self.form} {'needs a' if self.table is None else 'takes no'} table")
        if self.form != TABULATED and self.form not in FORMS:
            known = ", ".join(sorted((*FORMS, TABULATED)))
            raise ValueError(f"unknown latency form {self.form!r}; known: {known}")
        expected = 0 if self.form == TABULATED else len(FORMS[self.form](1.0, 1.0))
        if len(self.coefficients) != expected:
            raise ValueError(f"form {self.form} takes {expected} coefficients, got {len(self.coefficients)}")
        if not all(map(math.isfinite, (*self.coefficients, self.mape, self.residual_p5, self.residual_p95))):
            raise ValueError(f"a coefficient, the error or the interval of form {self.form} is not a finite number")
        if self.residual_p95 <= -1.0:
            raise ValueError(f"residual_p95 of form {self.form} must be above -1, got {self.residual_p95}")

    def predict_s(self, batch: float, length: float, cached: float = 0.0) -> float:
        """Duration in seconds, never negative, for `batch` sequences of `length` tokens each.

        cached: tokens per sequence that are there already and come before those computed (prefill).
        """
        if self.table is not None:
            return _behind(self.table, batch, length, cached)
        features = FORMS[self.form](batch, length, cached)
        total = 0.0
        for coefficient, feature in zip(self.coefficients, features, strict=True):
            total += coefficient * feature
        return total if total > 0.0 else 0.0

    def interval_s(self, batch: float, length: float, cached: float = 0.0) -> tuple[float, float]:
        """Between these two durations in seconds lie 90 % of the measurements."""
        predicted_s = self.predict_s(batch, length, cached)
        return max(0.0, predicted_s * (1.0 + self.residual_p5)), predicted_s * (1.0 + self.residual_p95)

    @property
    def noise(self) -> float:
        """Relative standard deviation of durations about the prediction, as wide as its 90 % interval; at most 0.5."""
        return min(max(0.0, self.residual_p95 - self.residual_p5) / (2.0 * _SIGMAS_OF_90), _MOST_NOISE)


def _behind(table: LatencyTable, batch: float, length: float, cached: float) -> float:
    """What the whole takes more than its cached part; for a polynomial the same as its square rule."""
    alone_s = table.at_s(batch, length)
    if cached <= 0.0:
        return alone_s
    whole_s = table.at_s(batch, cached + length) - table.at_s(batch, cached) + table.at_s(batch, 0.0)
    # Tokens that attend to more tokens never take less; a table measured with noise may say so.
    return max(alone_s, whole_s)
