"""Which law the time of an operation follows, by attention, number format and length.

Every (model, operation, batch, length) is timed once per round, so that a slow stretch of the machine falls on all of
them alike. Fits and their held-out errors are those of the profiler.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from bench.fidelity.forms_model import ATTENTIONS, INT8, WEIGHTS, Variant, load, prefill_s, train_s
from services.latency import OpKind
from services.profiler.fit import Fit, Timing, fit_op
from services.profiler.outliers import without_outliers

#: Rounds that fits need; a deadline does not cut below them.
FEWEST_ROUNDS = 3

#: Ranges that forms are fitted to: name -> shortest and longest sequence.
RANGES = {"short": (1, 64), "long": (65, 1 << 30), "all": (1, 1 << 30)}

_TRAIN = "train"
_PREFILL = "prefill"
#: A forward and a backward together follow the law of a backward.
_KINDS = {_PREFILL: OpKind.PREFILL, _TRAIN: OpKind.TRAIN_BACKWARD}
_TIMERS: Mapping[str, Callable[[Any, int, int], float]] = {_PREFILL: prefill_s, _TRAIN: train_s}


@dataclass(frozen=True, slots=True)
class FormsConfig:
    """Sizes of the study. most_tokens: of one prefill; a training operation has half as many."""

    hidden: int = 256
    layers: int = 2
    batches: tuple[int, ...] = (1, 2)
    lengths: tuple[int, ...] = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
    most_tokens: int = 1024
    rounds: int = 6
    deadline_s: float = 90.0


class Series(NamedTuple):
    """One operation of one model."""

    variant: Variant
    op: str


Progress = Callable[[int, int], None]


def measure(config: FormsConfig, progress: Progress) -> dict[Series, list[Timing]]:
    """Timings by series. The first round warms up and does not count."""
    torch.set_num_threads(1)
    variants = [Variant(attention, weights) for attention in ATTENTIONS for weights in WEIGHTS]
    models = {
        variant: load(variant, hidden=config.hidden, layers=config.layers, max_length=max(config.lengths))
        for variant in variants
    }
    work = [
        (Series(variant, op), batch, length)
        for variant in variants
        for op in _ops(variant)
        for batch, length in _points(config, op)
    ]
    durations: dict[tuple[Series, int, int], list[float]] = {item: [] for item in work}
    deadline_s = time.perf_counter() + config.deadline_s
    for index in range(config.rounds + 1):
        if index > FEWEST_ROUNDS and time.perf_counter() > deadline_s:
            break
        for series, batch, length in work:
            seconds = _TIMERS[series.op](models[series.variant], batch, length)
            if index:
                durations[series, batch, length].append(seconds)
        progress(index + 1, config.rounds + 1)
    return _timings(durations)


def _ops(variant: Variant) -> tuple[str, ...]:
    """Rounded weights have no gradients."""
    return (_PREFILL,) if variant.weights == INT8 else (_PREFILL, _TRAIN)


def _points(config: FormsConfig, op: str) -> Iterable[tuple[int, int]]:
    most = config.most_tokens if op == _PREFILL else config.most_tokens // 2
    return ((batch, length) for batch in config.batches for length in config.lengths if batch * length <= most)


def _timings(durations: Mapping[tuple[Series, int, int], Sequence[float]]) -> dict[Series, list[Timing]]:
    by_series: dict[Series, list[tuple[int, int, Sequence[float]]]] = {}
    for (series, batch, length), values in durations.items():
        by_series.setdefault(series, []).append((batch, length, values))
    result = {}
    for series, points in by_series.items():
        kept = without_outliers([values for _, _, values in points])
        result[series] = [Timing(batch, length, d) for (batch, length, _), d in zip(points, kept, strict=True)]
    return result


def study(timings: Mapping[Series, Sequence[Timing]]) -> list[dict[str, Any]]:
    """Fits of every form to every series and range: an entry of the summary each."""
    return [
        _entry(series, name, [point for point in points if low <= point.length <= high])
        for series, points in timings.items()
        for name, (low, high) in RANGES.items()
    ]


def _entry(series: Series, name: str, points: Sequence[Timing]) -> dict[str, Any]:
    fits = fit_op(0, _KINDS[series.op], points)
    (chosen,) = [fit.form for fit in fits if fit.chosen]
    return {
        **series.variant._asdict(),
        "op": series.op,
        "range": name,
        "shortest": min(point.length for point in points),
        "longest": max(point.length for point in points),
        "points": len(points),
        "noise": noise(points),
        "chosen": chosen,
        "forms": {fit.form: _form(fit, points) for fit in fits},
    }


def noise(points: Sequence[Timing]) -> float:
    """What one repetition differs from the median of its point, on average (a fraction): nobody predicts better."""
    differences = []
    for point in points:
        middle_s = statistics.median(point.durations_s)
        differences += [abs(duration_s / middle_s - 1.0) for duration_s in point.durations_s]
    return statistics.fmean(differences)


def _form(fit: Fit, points: Sequence[Timing]) -> dict[str, Any]:
    model = fit.model
    errors = {
        point.length: model.predict_s(point.batch, point.length) / statistics.median(point.durations_s) - 1.0
        for point in points
        if point.batch == 1
    }
    return {
        "coefficients": list(fit.coefficients),
        "mape": fit.mape,
        "r2": fit.r2,
        "residual_p5": fit.residual_p5,
        "residual_p95": fit.residual_p95,
        "error_by_length": errors,
    }
