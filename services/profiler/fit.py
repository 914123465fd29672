"""Fits latency models to timings and chooses one per (stage, operation) by held-out error.

Source: paper section 4 (the quadratic form). Coefficients are found by non-negative least squares on the relative
error, so that a prediction is never negative and short operations count as much as long ones. Pure: no clock, no I/O.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import scipy.optimize

from services.latency import FORMS, LatencyTable, OpKind

_Array = npt.NDArray[np.float64]

#: Forms tried per operation, simplest first.
CANDIDATES: Mapping[OpKind, tuple[str, ...]] = {
    OpKind.PREFILL: ("quadratic", "affine", "full"),
    OpKind.DECODE: ("quadratic", "affine", "full_decode"),
    OpKind.TRAIN_FORWARD: ("quadratic", "affine", "full"),
    OpKind.TRAIN_BACKWARD: ("quadratic", "affine", "full"),
    OpKind.OPTIMIZER_STEP: ("constant",),
    OpKind.WEIGHT_SYNC: ("constant",),
}

#: Up to so many points every point is held out once; beyond, that many folds.
MAX_FOLDS = 20

#: A form with more coefficients must beat a simpler one by this fraction of its held-out error.
PARSIMONY = 0.05


class FitError(ValueError):
    """Timings that no latency model can be fitted to; the message says why."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Repeated timings of one grid point: `batch` sequences of `length` tokens, durations in seconds."""

    batch: int
    length: int
    durations_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """One form fitted to one operation of one stage.

    mape and r2 are over held-out points; residual_p5 and residual_p95 are quantiles of measured / predicted - 1 over
    every repetition of the held-out points (fractions).
    """

    stage: int
    op: OpKind
    form: str
    coefficients: tuple[float, ...]
    mape: float
    r2: float
    residual_p5: float
    residual_p95: float
    chosen: bool = False
    table: LatencyTable | None = None


def fit_all(timings: Mapping[tuple[int, OpKind], Sequence[Timing]]) -> list[Fit]:
    """Every form of every (stage, operation), in that order, exactly one of each chosen. Raises FitError."""
    fits: list[Fit] = []
    for (stage, op), points in sorted(timings.items()):
        fits.extend(fit_op(stage, op, points))
    return fits


def fit_op(stage: int, op: OpKind, timings: Sequence[Timing]) -> list[Fit]:
    """Candidate forms of one operation on one stage, the best marked as chosen.

    Points measured more than once are merged. A form whose coefficients the points cannot tell apart is left out
    (a node that takes one sequence at a time says nothing about batches). Raises FitError naming stage and operation
    when no form is left (too few points, or all the same), or when a duration is not a positive number.
    """
    where = f"stage {stage}, {op.value}"
    merged = _merge(timings, where)
    forms = CANDIDATES[op]
    if forms == ("constant",):
        # A constant has no grid to hold points out of: every repetition is a point of its own.
        durations = [duration for point in merged for duration in point.durations_s]
        merged = [Timing(1, index, (duration,)) for index, duration in enumerate(durations, start=1)]
    fits = [_fit_form(stage, op, form, merged) for form in forms if _is_determined(form, merged)]
    if not fits:
        raise FitError(f"{where}: {len(merged)} different point(s) are too few to fit a latency model")
    best = _choose(fits)
    return [replace(fit, chosen=fit is best) for fit in fits]


def _merge(timings: Iterable[Timing], where: str) -> list[Timing]:
    durations: dict[tuple[int, int], list[float]] = defaultdict(list)
    for timing in timings:
        if timing.batch < 1 or timing.length < 1:
            raise FitError(f"{where}: batch {timing.batch} and length {timing.length} must be at least 1")
        durations[timing.batch, timing.length].extend(timing.durations_s)
    for (batch, length), values in durations.items():
        if not values:
            raise FitError(f"{where}: no duration for batch {batch}, length {length}")
        if not all(np.isfinite(value) and value > 0.0 for value in values):
            raise FitError(f"{where}: a duration for batch {batch}, length {length} is not a positive number")
    return [Timing(batch, length, tuple(values)) for (batch, length), values in sorted(durations.items())]


def _fit_form(stage: int, op: OpKind, form: str, points: Sequence[Timing]) -> Fit:
    features = _features(form, points)
    measured = np.array([float(np.median(point.durations_s)) for point in points], dtype=np.float64)
    held_out = _held_out_predictions(features, measured)
    relative = np.abs(held_out - measured) / measured
    spread = [
        duration / predicted - 1.0
        for point, predicted in zip(points, held_out, strict=True)
        for duration in point.durations_s
    ]
    return Fit(
        stage=stage,
        op=op,
        form=form,
        coefficients=tuple(float(value) for value in _solve(features, measured)),
        mape=float(np.mean(relative)),
        r2=_r2(measured, held_out),
        residual_p5=float(np.quantile(spread, 0.05)),
        residual_p95=float(np.quantile(spread, 0.95)),
    )


def _features(form: str, points: Sequence[Timing]) -> _Array:
    return np.array([FORMS[form](point.batch, point.length) for point in points], dtype=np.float64)


def _is_determined(form: str, points: Sequence[Timing]) -> bool:
    """Whether the points fix every coefficient, with one to spare to be held out."""
    if not points:
        return False
    features = _features(form, points)
    coefficients = features.shape[1]
    rank = int(np.linalg.matrix_rank(features / features.max(axis=0)))
    return bool(len(points) > coefficients and rank == coefficients)


def _solve(features: _Array, measured: _Array) -> _Array:
    """Coefficients >= 0 with the smallest sum of squared relative errors."""
    scale = features.max(axis=0)  # columns differ by many orders of magnitude: C * l^2 against 1
    solution, _ = scipy.optimize.nnls(features / scale / measured[:, None], np.ones(len(measured)))
    return np.asarray(solution / scale, dtype=np.float64)


def _held_out_predictions(features: _Array, measured: _Array) -> _Array:
    """Prediction of every point by a fit that did not see it."""
    folds = np.arange(len(measured)) % min(len(measured), MAX_FOLDS)
    predicted = np.empty_like(measured)
    for fold in np.unique(folds):
        out = folds == fold
        predicted[out] = features[out] @ _solve(features[~out], measured[~out])
    return predicted


def _r2(measured: _Array, predicted: _Array) -> float:
    """Coefficient of determination; 0 when the measurements do not vary, as for a constant."""
    total = float(np.sum((measured - measured.mean()) ** 2))
    return 1.0 - float(np.sum((measured - predicted) ** 2)) / total if total > 0.0 else 0.0


def _choose(fits: Sequence[Fit]) -> Fit:
    best = fits[0]
    for fit in fits[1:]:
        margin = PARSIMONY if len(fit.coefficients) > len(best.coefficients) else 0.0
        if fit.mape < best.mape * (1.0 - margin):
            best = fit
    return best
