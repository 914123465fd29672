"""Fits what operations cost that run in one, beside each other, or between device and host memory. Pure."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from services.latency import HostLink, Interference, LatencyModel, MixedCost, OpKind
from services.profiler.fit import PARSIMONY, solve
from services.profiler.residuals import Array, held_out, medians

#: A mixed cost with one coefficient and with two needs so many points, one of them to be held out.
_FEWEST_FOR_ONE, _FEWEST_FOR_TWO = 2, 4


@dataclass(frozen=True, slots=True)
class MixedTiming:
    """A prefill of `batch` prompts of `length` tokens behind `cached` ones, and `decodes` of `decode_length` tokens."""

    batch: int
    length: int
    cached: int
    decodes: int
    decode_length: int
    durations_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class BusyTiming:
    """An operation while the node's other stages run `busy` again and again. point: what tells it from others."""

    op: OpKind
    busy: OpKind
    point: tuple[int, ...]
    durations_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class MoveTiming:
    """A copy of `num_bytes` between device and host."""

    op: OpKind
    num_bytes: int
    durations_s: tuple[float, ...]


_Weights: TypeAlias = tuple[float, float, float]


def fit_mixed(timings: Sequence[MixedTiming], prefill: LatencyModel, decode: LatencyModel) -> MixedCost:
    """Cost of mixed operations on one stage in terms of the chosen models of both parts.

    Three laws are tried, simplest first: the sum; the sum less a share of the shorter part (weights are read once);
    each part with a factor of its own. At least one point.
    """
    durations_s = [timing.durations_s for timing in timings]
    measured = medians(durations_s)
    parts = np.array(
        [
            (prefill.predict_s(t.batch, t.length, t.cached), decode.predict_s(t.decodes, t.decode_length))
            for t in timings
        ],
        dtype=np.float64,
    )
    laws: list[tuple[Callable[[Array, Array], _Weights], int]] = [(_sum, 1)]
    laws += [(_shared, _FEWEST_FOR_ONE), (_factors, _FEWEST_FOR_TWO)]
    best: MixedCost | None = None
    for law, fewest in laws:
        if len(timings) < fewest:
            continue
        error = held_out(_mixed_held_out(law, parts, measured), durations_s)
        if best is None or error.mape < best.mape * (1.0 - PARSIMONY):
            cost = MixedCost(*law(parts, measured))
            best = replace(cost, mape=error.mape, residual_p5=error.residual_p5, residual_p95=error.residual_p95)
    if best is None:
        raise ValueError("no mixed operation was timed")
    return best


def _mixed_held_out(law: Callable[[Array, Array], _Weights], parts: Array, measured: Array) -> Array:
    predicted = np.empty_like(measured)
    for index in range(len(measured)):
        others = np.arange(len(measured)) != index
        predicted[index] = MixedCost(*law(parts[others], measured[others])).predict_s(*map(float, parts[index]))
    return predicted


def _sum(parts: Array, measured: Array) -> _Weights:
    del parts, measured
    return 1.0, 1.0, 0.0


def _shared(parts: Array, measured: Array) -> _Weights:
    """The share of the shorter part with the smallest squared relative error, between nothing and all of it."""
    shorter = parts.min(axis=1) / measured
    missing = (parts.sum(axis=1) - measured) / measured
    total = float(shorter @ shorter)
    share = float(shorter @ missing) / total if total > 0.0 else 0.0
    return 1.0, 1.0, min(max(share, 0.0), 1.0)


def _factors(parts: Array, measured: Array) -> _Weights:
    if not bool(np.all(parts.max(axis=0) > 0.0)):
        return 1.0, 1.0, 0.0
    prefill, decode = (float(value) for value in solve(parts, measured))
    return prefill, decode, 0.0


def fit_interference(
    stage: int, timings: Sequence[BusyTiming], alone_s: Mapping[tuple[OpKind, tuple[int, ...]], float]
) -> list[Interference]:
    """Slowdowns of one stage by (operation, busy): the median over the points that were measured alone too.

    alone_s: median duration by (operation, point) with idle neighbours.
    """
    ratios: dict[tuple[OpKind, OpKind], list[tuple[float, ...]]] = defaultdict(list)
    for timing in timings:
        alone = alone_s.get((timing.op, timing.point))
        if alone is not None:
            ratios[timing.op, timing.busy].append(tuple(duration / alone for duration in timing.durations_s))
    return [_interference(stage, op, busy, ratios[op, busy]) for op, busy in sorted(ratios)]


def _interference(stage: int, op: OpKind, busy: OpKind, ratios: Sequence[tuple[float, ...]]) -> Interference:
    middles = [statistics.median(point) for point in ratios]
    # One point has no spread over points: that of its repetitions stands in.
    spread = statistics.pstdev(middles if len(middles) > 1 else ratios[0])
    return Interference(stage, op, busy, statistics.median(middles) - 1.0, spread)


def fit_host_link(timings: Sequence[MoveTiming]) -> HostLink | None:
    """fixed_s + bytes / bandwidth, one bandwidth for each way; None unless both ways were measured."""
    ways = {timing.op for timing in timings}
    if ways != {OpKind.OFFLOAD, OpKind.RELOAD}:
        return None
    measured = medians([timing.durations_s for timing in timings])
    features = np.array([(1.0, *_bytes(timing)) for timing in timings], dtype=np.float64)
    if len(timings) > features.shape[1]:
        fixed_s, *per_byte = (float(value) for value in solve(features, measured))
        if min(per_byte) > 0.0:
            return HostLink(1.0 / per_byte[0], 1.0 / per_byte[1], fixed_s)
    # Too few sizes, or all of them too small to tell: time per byte of the largest each way.
    rates = []
    for way in (OpKind.OFFLOAD, OpKind.RELOAD):
        largest = max((timing for timing in timings if timing.op is way), key=lambda timing: timing.num_bytes)
        rates.append(largest.num_bytes / statistics.median(largest.durations_s))
    return HostLink(rates[0], rates[1])


def _bytes(timing: MoveTiming) -> tuple[float, float]:
    size = float(timing.num_bytes)
    return (size, 0.0) if timing.op is OpKind.OFFLOAD else (0.0, size)
