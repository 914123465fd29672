"""Fits latency models to timings and chooses one per (stage, operation) by held-out error.

Source: paper section 4 (the quadratic form). Coefficients are found by non-negative least squares on the relative
error, so that a prediction is never negative and short operations count as much as long ones. Pure: no clock, no I/O.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.optimize

from services.latency import FORMS, TABULATED, LatencyModel, LatencyTable, OpKind
from services.profiler.residuals import Array, HeldOut, held_out, medians
from services.profiler.tabulate import held_out_s, tabulate

#: Forms tried per operation, simplest first; a table comes last.
CANDIDATES: Mapping[OpKind, tuple[str, ...]] = {
    OpKind.PREFILL: ("quadratic", "affine", "full", TABULATED),
    OpKind.DECODE: ("quadratic", "affine", "full_decode", TABULATED),
    OpKind.TRAIN_FORWARD: ("quadratic", "affine", "full", TABULATED),
    OpKind.TRAIN_BACKWARD: ("quadratic", "affine", "full", TABULATED),
    OpKind.OPTIMIZER_STEP: ("constant",),
    OpKind.WEIGHT_SYNC: ("constant",),
}

#: Up to so many points every point is held out once; beyond, that many folds.
MAX_FOLDS = 20

#: A form with more coefficients must beat a simpler one by this fraction of its held-out error, and by this much of the
#: duration.
PARSIMONY = 0.05
LEAST_GAIN = 1e-4

#: A table must beat the best polynomial by this fraction: beyond its grid it only goes on straight.
TABLE_MARGIN = 0.2
#: And by this much of the duration.
TABLE_GAIN = 0.005


class FitError(ValueError):
    """Timings that no latency model can be fitted to; the message says why."""


class TooFewPointsError(FitError):
    """The timings are sound, but they do not fix the coefficients of any form."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Repeated timings of one grid point: `batch` sequences of `length` tokens, durations in seconds.

    cached: tokens per sequence that were there already and came before those computed.
    """

    batch: int
    length: int
    durations_s: tuple[float, ...]
    cached: int = 0


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

    @property
    def model(self) -> LatencyModel:
        """What predicts with it."""
        return LatencyModel(
            self.form, self.coefficients, self.mape, self.residual_p5, self.residual_p95, table=self.table
        )


def fit_all(timings: Mapping[tuple[int, OpKind], Sequence[Timing]], *, skip_too_few: bool = False) -> list[Fit]:
    """Every form of every (stage, operation), in that order, exactly one of each chosen. Raises FitError.

    skip_too_few: leave out an operation whose points fix no form.
    """
    fits: list[Fit] = []
    for (stage, op), points in sorted(timings.items()):
        try:
            fits.extend(fit_op(stage, op, points))
        except TooFewPointsError:
            if not skip_too_few:
                raise
    return fits


def fit_op(stage: int, op: OpKind, timings: Sequence[Timing]) -> list[Fit]:
    """Candidate forms of one operation on one stage, the best marked as chosen.

    Points measured more than once are merged. A form whose coefficients the points cannot tell apart is left out
    (a node that takes one sequence at a time says nothing about batches). Raises FitError naming stage and operation
    when a duration is not a positive number, TooFewPointsError when no form is left (too few points, or all the same).
    """
    where = f"stage {stage}, {op.value}"
    merged = _merge(timings, where)
    forms = CANDIDATES[op]
    if forms == ("constant",):
        # A constant has no grid to hold points out of: every repetition is a point of its own.
        durations = [duration for point in merged for duration in point.durations_s]
        merged = [Timing(1, index, (duration,)) for index, duration in enumerate(durations, start=1)]
    fits = [_fit_form(stage, op, form, merged) for form in forms if form != TABULATED and _is_determined(form, merged)]
    if not fits:
        raise TooFewPointsError(f"{where}: {len(merged)} different point(s) are too few to fit a latency model")
    best = _choose(fits)
    if TABULATED in forms:
        table, is_better = _fit_table(best, merged)
        fits += [table] if table else []
        best = table if table and is_better else best
    return [replace(fit, chosen=fit is best) for fit in fits]


def _merge(timings: Iterable[Timing], where: str) -> list[Timing]:
    durations: dict[tuple[int, int, int], list[float]] = defaultdict(list)
    for timing in timings:
        if timing.batch < 1 or timing.length < 1 or timing.cached < 0:
            raise FitError(f"{where}: batch {timing.batch} and length {timing.length} must be at least 1")
        durations[timing.batch, timing.length, timing.cached].extend(timing.durations_s)
    for (batch, length, cached), values in durations.items():
        behind = f" behind {cached} tokens" if cached else ""
        check_durations(values, where, f"batch {batch}, length {length}{behind}")
    return [Timing(batch, length, tuple(known), cached) for (batch, length, cached), known in sorted(durations.items())]


def check_durations(durations_s: Sequence[float], where: str, point: str) -> None:
    """Raises FitError naming the point when there is no duration, or one is not a positive number."""
    if not durations_s:
        raise FitError(f"{where}: no duration for {point}")
    for duration_s in durations_s:
        if not (math.isfinite(duration_s) and duration_s > 0.0):
            raise FitError(f"{where}: a duration for {point} is not a positive number: {duration_s}")


def _fit_form(stage: int, op: OpKind, form: str, points: Sequence[Timing]) -> Fit:
    features = _features(form, points)
    durations_s = [point.durations_s for point in points]
    measured = medians(durations_s)
    error = held_out(held_out_predictions(features, measured), durations_s)
    return _fit(stage, op, form, solve(features, measured), error)


def _fit(stage: int, op: OpKind, form: str, coefficients: Iterable[float], error: HeldOut) -> Fit:
    return Fit(
        stage=stage,
        op=op,
        form=form,
        coefficients=tuple(float(value) for value in coefficients),
        mape=error.mape,
        r2=error.r2,
        residual_p5=error.residual_p5,
        residual_p95=error.residual_p95,
    )


def _fit_table(best: Fit, points: Sequence[Timing]) -> tuple[Fit | None, bool]:
    """The tabulated form, and whether it is better than the best polynomial where both can be judged."""
    durations_s = [point.durations_s for point in points]
    measured = medians(durations_s)
    known = {(p.batch, p.length): float(m) for p, m in zip(points, measured, strict=True) if not p.cached}
    table = tabulate(known, best.model)
    if table is None:
        return None, False
    predicted = held_out_s(known, table, [(point.batch, point.length, point.cached) for point in points])
    judged = [index for index, value in enumerate(predicted) if value is not None]
    if not judged:
        return None, False
    seen = [durations_s[index] for index in judged]
    error = held_out(np.array([predicted[index] for index in judged], dtype=np.float64), seen)
    smooth = held_out_predictions(_features(best.form, points), measured)[judged]
    fit = replace(_fit(best.stage, best.op, TABULATED, (), error), table=table)
    other = held_out(smooth, seen).mape
    return fit, error.mape < min(other * (1.0 - TABLE_MARGIN), other - TABLE_GAIN)


def _features(form: str, points: Sequence[Timing]) -> Array:
    return np.array([FORMS[form](point.batch, point.length, point.cached) for point in points], dtype=np.float64)


def _is_determined(form: str, points: Sequence[Timing]) -> bool:
    """Whether the points fix every coefficient, with one to spare to be held out."""
    if not points:
        return False
    features = _features(form, points)
    coefficients = features.shape[1]
    rank = int(np.linalg.matrix_rank(features / features.max(axis=0)))
    return bool(len(points) > coefficients and rank == coefficients)


def solve(features: Array, measured: Array) -> Array:
    """Coefficients >= 0 with the smallest sum of squared relative errors; features have one row per measurement."""
    scale = features.max(axis=0)  # columns differ by many orders of magnitude: C * l^2 against 1
    solution, _ = scipy.optimize.nnls(features / scale / measured[:, None], np.ones(len(measured)))
    return np.asarray(solution / scale, dtype=np.float64)


def held_out_predictions(features: Array, measured: Array) -> Array:
    """Prediction of every point by a fit that did not see it."""
    folds = np.arange(len(measured)) % min(len(measured), MAX_FOLDS)
    predicted = np.empty_like(measured)
    for fold in np.unique(folds):
        out = folds == fold
        predicted[out] = features[out] @ solve(features[~out], measured[~out])
    return predicted


def _choose(fits: Sequence[Fit]) -> Fit:
    best = fits[0]
    for fit in fits[1:]:
        limit = best.mape
        if len(fit.coefficients) > len(best.coefficients):
            limit = best.mape * (1.0 - PARSIMONY) - LEAST_GAIN
        if fit.mape < limit:
            best = fit
    return best
