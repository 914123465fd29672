"""How good predictions were: errors, coverage of intervals, and the noise no prediction can be better than. Pure.

Errors are shares: |measured - predicted| / measured.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from bench.fidelity.ops import Sample
from bench.fidelity.trace import RequestTrace, Trace
from services.latency import OpKind

#: Operations that the profile expects to be shorter are not judged: timers and messages weigh as much as they do.
SHORTEST_S = 0.005
#: Repetitions of one size from which its spread is told.
_ENOUGH = 6
#: Decodes whose contexts differ by less than this factor count as repetitions of one size.
_SAME_CONTEXT = 1.1

Key = tuple[Any, ...]


def mape(pairs: Iterable[tuple[float, float]]) -> float | None:
    """Mean of |measured - predicted| / measured over (measured, predicted); None of nothing."""
    errors = [abs(measured - predicted) / measured for measured, predicted in pairs if measured > 0.0]
    return statistics.fmean(errors) if errors else None


def of_ops(samples: Sequence[Sample]) -> dict[str, Any]:
    """Errors of the operations expected to take 5 ms or more, by kind, and their means over the kinds."""
    by_kind: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.profile_s >= SHORTEST_S:
            by_kind[sample.kind].append(sample)
    kinds = {kind: _of_kind(found) for kind, found in sorted(by_kind.items())}
    # Single, rare operations say nothing about a mean.
    counted = [figures for figures in kinds.values() if figures["ops"] >= _ENOUGH]
    names = ("profile_mape", "online_mape", "noise_floor", "profile_coverage", "online_coverage")
    return {"kinds": kinds} | {name: _mean(figures[name] for figures in counted) for name in names}


def _of_kind(samples: Sequence[Sample]) -> dict[str, Any]:
    return {
        "ops": len(samples),
        "median_ms": 1000.0 * statistics.median(sample.measured_s for sample in samples),
        "profile_mape": mape((sample.measured_s, sample.profile_s) for sample in samples),
        "online_mape": mape((sample.measured_s, sample.online_s) for sample in samples),
        "noise_floor": noise_floor(samples),
        "profile_bias": statistics.median(sample.measured_s / sample.profile_s for sample in samples) - 1.0,
        "profile_coverage": _share(sample.low_s <= sample.measured_s <= sample.high_s for sample in samples),
        "online_coverage": _share(
            sample.online_low_s <= sample.measured_s <= sample.online_high_s for sample in samples
        ),
    }


def noise_floor(samples: Iterable[Sample]) -> float | None:
    """Error of the best predictor there can be: repetitions of one size against the median of the other half of them.

    Every second repetition makes one half, so that a slow change of the machine is in both. None when no size came
    often enough.
    """
    groups: defaultdict[Key, list[float]] = defaultdict(list)
    for sample in samples:
        groups[_size_key(sample)].append(sample.measured_s)
    pairs: list[tuple[float, float]] = []
    for times in groups.values():
        if len(times) >= _ENOUGH:
            halves = times[::2], times[1::2]
            for own, other in (halves, halves[::-1]):
                median = statistics.median(other)
                pairs += [(time, median) for time in own]
    return mape(pairs)


def _size_key(sample: Sample) -> Key:
    size = sample.size
    place = (sample.node_id, sample.stage, sample.kind, size.batch, size.parts, size.decodes)
    if sample.kind == OpKind.DECODE:
        return (*place, _bucket(size.length))
    return (*place, size.length, size.cached, _bucket(size.decode_length))


def _bucket(length: float) -> int:
    return round(math.log(max(1.0, length)) / math.log(_SAME_CONTEXT))


def of_responses(trace: Trace, start_s: float) -> dict[str, Any]:
    """Errors of the times to first token predicted at placement, of the requests that arrived since `start_s`.

    What a later decision sent to the same node before the first token could not be known when the prediction was made:
    such requests are counted apart (`with_later_arrivals`).
    """
    known: list[tuple[float, float]] = []
    disturbed: list[tuple[float, float]] = []
    others = _assignments(trace)
    for request in trace.requests.values():
        pair = response(request)
        if pair is None or request.task.arrival_s < start_s:
            continue
        (disturbed if _is_disturbed(request, others) else known).append(pair)
    return {
        "requests": len(known),
        "mape": mape(known),
        "median_error": _median(abs(measured - predicted) / measured for measured, predicted in known),
        "bias": _median(measured / predicted - 1.0 for measured, predicted in known),
        "with_later_arrivals": {"requests": len(disturbed), "mape": mape(disturbed)},
        "all": {"requests": len(known) + len(disturbed), "mape": mape(known + disturbed)},
        "pairs_ms": [[1000.0 * measured, 1000.0 * predicted] for measured, predicted in known],
    }


def response(request: RequestTrace) -> tuple[float, float] | None:
    """(measured, predicted) time to first token, seconds; None without one of them."""
    if not request.ok or request.first_token_s is None or request.predicted_s is None:
        return None
    return request.first_token_s - request.task.arrival_s, request.predicted_s


def _assignments(trace: Trace) -> dict[str, list[float]]:
    """When requests were sent to each node."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for at_s, node_id, task_id in trace.assignments:
        if task_id in trace.requests:
            found[node_id].append(at_s)
    return found


def _is_disturbed(request: RequestTrace, assignments: dict[str, list[float]]) -> bool:
    begin_s, end_s = request.assigned_s, request.first_token_s
    if begin_s is None or end_s is None:
        return False
    return any(begin_s < at_s < end_s for at_s in assignments[request.node_id])


def _share(values: Iterable[bool]) -> float | None:
    return _mean(float(value) for value in values)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _median(values: Iterable[float]) -> float | None:
    known: list[float] = list(values)
    return statistics.median(known) if known else None


def by_company(samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """By what ran on the node's other stages when an operation began: how much longer it took than predicted alone."""
    groups: defaultdict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.profile_s >= SHORTEST_S:
            groups[sample.kind, "+".join(sample.beside) or "alone"].append(sample)
    return {
        f"{kind} beside {beside}": {
            "ops": len(found),
            "measured_over_profile": statistics.median(sample.measured_s / sample.profile_s for sample in found),
        }
        for (kind, beside), found in sorted(groups.items())
    }
