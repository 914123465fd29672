"""Error and spread of predictions of points that a fit did not see. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """mape and r2 of the points' medians; residual_p5, residual_p95: of measured / predicted - 1 (fractions)."""

    mape: float
    r2: float
    residual_p5: float
    residual_p95: float


def held_out(predicted_s: Array, durations_s: Sequence[Sequence[float]]) -> HeldOut:
    """What held-out predictions, one per point, make of the points' repetitions. At least one point."""
    measured = medians(durations_s)
    ratios = [
        duration / predicted - 1.0 if predicted > 0.0 else math.inf
        for predicted, durations in zip(predicted_s, durations_s, strict=True)
        for duration in durations
    ]
    low, high = interval(ratios)
    return HeldOut(float(np.mean(np.abs(predicted_s - measured) / measured)), _r2(measured, predicted_s), low, high)


def medians(durations_s: Sequence[Sequence[float]]) -> Array:
    """Median of every point's repetitions."""
    return np.array([float(np.median(durations)) for durations in durations_s], dtype=np.float64)


def interval(residuals: Sequence[float]) -> tuple[float, float]:
    """5 % and 95 % quantiles such that a new residual of the same kind lies between them with 90 % probability.

    The ranks are those of split conformal prediction: a little wider than plain quantiles, the more so the fewer
    residuals there are. Infinite residuals (a prediction of 0) count as the largest finite one.
    """
    finite = sorted(value for value in residuals if math.isfinite(value))
    if not finite:
        return 0.0, 0.0
    ordered = finite + [finite[-1]] * (len(residuals) - len(finite))
    low = math.floor(0.05 * (len(ordered) + 1)) - 1
    high = math.ceil(0.95 * (len(ordered) + 1)) - 1
    return ordered[max(low, 0)], ordered[min(high, len(ordered) - 1)]


def _r2(measured: Array, predicted: Array) -> float:
    """Coefficient of determination; 0 when the measurements do not vary, as for a constant."""
    total = float(np.sum((measured - measured.mean()) ** 2))
    return 1.0 - float(np.sum((measured - predicted) ** 2)) / total if total > 0.0 else 0.0
