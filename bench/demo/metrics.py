"""Figures of one run. Pure: records in, plain numbers out; one definition each, the same as everywhere in LeMix.

Fractions are 0 to 1; the denominator of attainment is every request that was due.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from bench.demo.records import OpRecord, RunRecord, Slo, TaskSpan
from bench.live.requests import RequestRecord, Status
from services.latency import OpKind

Interval = tuple[float, float]


def policy_metrics(run: RunRecord, slo: Slo, hold_s: float) -> dict[str, Any]:
    """The entry of one policy in `summary.json`."""
    served = [item for item in run.requests if item.status is Status.OK]
    trained = [span for span in run.spans if span.training and span.ok and _ended_by(span, run.wall_s)]
    tasks = len(served) + len(trained)
    held_s = sum(held_node_s(run.spans, run.wall_s, hold_s).values())
    per_stage = stage_utilisation(run.ops, run.wall_s)
    return {
        "tasks_per_s": tasks / run.wall_s,
        "tasks_per_held_node_s": tasks / held_s if held_s > 0 else 0.0,
        "slo_attainment": attainment(run.requests, slo),
        "ttft_ms": _milliseconds(item.ttft_s for item in served),
        "tpot_ms": _milliseconds(item.tpot_s for item in served),
        "inference_loss": inference_loss(run),
        "trained_tokens": run.trained_tokens,
        "trained_tokens_per_s": run.trained_tokens / run.wall_s,
        "steps_per_replica": steps_per_replica(run.ops, run.spans, run.wall_s),
        "staleness_s": _quantiles(staleness(run)),
        "requests": count_requests(run.requests),
        "utilisation": utilisation(run.ops, run.wall_s),
        "cpu_share": {role: seconds / (run.wall_s * run.cores) for role, seconds in sorted(run.cpu_s.items())},
        "details": {
            "wall_s": run.wall_s,
            "tasks": {"inference": len(served), "training": len(trained)},
            "held_node_s": held_node_s(run.spans, run.wall_s, hold_s),
            "stage_utilisation": {f"{node}/{stage}": value for (node, stage), value in per_stage.items()},
            "busy_share": busy_shares(run.ops, run.wall_s),
            "client_lag_ms": _milliseconds(item.sent_s - item.at_s for item in run.requests),
            "output_tokens_per_s": sum(item.output_tokens for item in served) / run.wall_s,
            "served_by": _served_by(served),
            "training_loss": _training_loss(run),
        },
    }


def attainment(requests: Sequence[RequestRecord], slo: Slo) -> float:
    """Share of all requests that kept both promises; whatever did not end well is a miss."""
    return sum(kept(item, slo) for item in requests) / len(requests) if requests else 0.0


def kept(request: RequestRecord, slo: Slo) -> bool:
    """Whether one request kept its promise. A single token has no time per further token."""
    if request.status is not Status.OK or request.ttft_s is None or request.ttft_s > slo.ttft_s:
        return False
    return request.tpot_s is None or request.tpot_s <= slo.tpot_s


def count_requests(requests: Sequence[RequestRecord]) -> dict[str, int]:
    """Requests by end; unfinished ones count as failed."""
    ok = sum(item.status is Status.OK for item in requests)
    rejected = sum(item.status is Status.REJECTED for item in requests)
    return {"sent": len(requests), "ok": ok, "failed": len(requests) - ok - rejected, "rejected": rejected}


def inference_loss(run: RunRecord) -> dict[str, float | None]:
    """Mean loss of the true continuations, nats per token, by thirds of the planned time and since the drift."""
    third = run.planned_s / 3.0
    parts = {
        "first_third": (0.0, third),
        "middle_third": (third, 2 * third),
        "last_third": (2 * third, math.inf),
        "after_drift": (run.drift_s, math.inf),
    }
    return {name: _mean_loss(run.requests, *window) for name, window in parts.items()}


def _mean_loss(requests: Iterable[RequestRecord], begin_s: float, end_s: float) -> float | None:
    losses = [
        item.reference_loss
        for item in requests
        if item.status is Status.OK and item.reference_loss is not None and begin_s <= item.at_s < end_s
    ]
    return sum(losses) / len(losses) if losses else None


def staleness(run: RunRecord) -> list[float]:
    """Age of the weights at each first token, seconds.

    Weights that no training step has reached are as old as the run at that moment: training began with it.
    """
    ages = []
    for item in run.requests:
        if item.status is Status.OK and item.first_token_s is not None:
            ages.append(item.first_token_s if item.staleness_s is None else item.staleness_s)
    return ages


def held_node_s(spans: Iterable[TaskSpan], wall_s: float, hold_s: float) -> dict[str, float]:
    """Seconds each node was held: from an assignment until it was idle for `hold_s`, within the run."""
    intervals: defaultdict[str, list[Interval]] = defaultdict(list)
    for span in spans:
        end_s = wall_s if span.end_s is None else span.end_s
        clipped = (max(0.0, span.assigned_s), min(wall_s, end_s + hold_s))
        if end_s > 0.0 and clipped[0] < clipped[1]:
            intervals[span.node_id].append(clipped)
    return {node: _total(merge(items)) for node, items in sorted(intervals.items())}


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """Union of intervals, in order, none touching another."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _total(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)


def _clip_ops(ops: Iterable[OpRecord], wall_s: float) -> dict[tuple[str, int], list[Interval]]:
    clipped: defaultdict[tuple[str, int], list[Interval]] = defaultdict(list)
    for op in ops:
        begin, end = max(0.0, op.begin_s), min(wall_s, op.end_s)
        if begin < end:
            clipped[op.node_id, op.stage].append((begin, end))
    return dict(clipped)


def stage_utilisation(ops: Sequence[OpRecord], wall_s: float) -> dict[tuple[str, int], float]:
    """Busy share of every stage between its node's first and last operation in the run."""
    by_stage = _clip_ops(ops, wall_s)
    spans = _node_spans(by_stage)
    return {key: _total(merge(items)) / spans[key[0]] for key, items in sorted(by_stage.items())}


def utilisation(ops: Sequence[OpRecord], wall_s: float) -> float:
    """1 - bubble rate: busy stage time over the stages' active spans, all nodes together."""
    by_stage = _clip_ops(ops, wall_s)
    spans = _node_spans(by_stage)
    span = sum(spans[node] for node, _ in by_stage)
    return sum(_total(merge(items)) for items in by_stage.values()) / span if span > 0 else 0.0


def _node_spans(by_stage: dict[tuple[str, int], list[Interval]]) -> dict[str, float]:
    edges: dict[str, Interval] = {}
    for (node, _), items in by_stage.items():
        begin, end = edges.get(node, (math.inf, -math.inf))
        edges[node] = (min(begin, *(item[0] for item in items)), max(end, *(item[1] for item in items)))
    return {node: end - begin for node, (begin, end) in edges.items()}


def busy_shares(ops: Iterable[OpRecord], wall_s: float) -> dict[str, dict[str, float]]:
    """By stage ("node/stage") and operation: its time over the run's time."""
    shares: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for op in ops:
        begin, end = max(0.0, op.begin_s), min(wall_s, op.end_s)
        if begin < end:
            shares[f"{op.node_id}/{op.stage}"][op.op.value] += (end - begin) / wall_s
    return {stage: dict(items) for stage, items in sorted(shares.items())}


def steps_per_replica(ops: Iterable[OpRecord], spans: Iterable[TaskSpan], wall_s: float) -> dict[str, int]:
    """Optimizer steps each node took in the run; nodes that only served are listed with 0."""
    steps = {span.node_id: 0 for span in spans}
    for op in ops:
        if op.op is OpKind.OPTIMIZER_STEP and op.stage == 0 and 0.0 <= op.end_s <= wall_s:
            steps[op.node_id] = steps.get(op.node_id, 0) + 1
    return dict(sorted(steps.items()))


def _training_loss(run: RunRecord) -> dict[str, float | None]:
    def mean(begin_s: float, end_s: float) -> float | None:
        losses = [loss for at, loss in run.training_loss if begin_s <= at < end_s]
        return sum(losses) / len(losses) if losses else None

    return {"before_drift": mean(0.0, run.drift_s), "after_drift": mean(run.drift_s, math.inf)}


def _served_by(served: Iterable[RequestRecord]) -> dict[str, int]:
    counts: defaultdict[str, int] = defaultdict(int)
    for item in served:
        counts[item.node_id] += 1
    return dict(sorted(counts.items()))


def _ended_by(span: TaskSpan, wall_s: float) -> bool:
    return span.end_s is not None and 0.0 <= span.end_s <= wall_s


def quantile(values: Sequence[float], share: float) -> float | None:
    """Linear between the two nearest ranks; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _quantiles(values: Sequence[float]) -> dict[str, float | None]:
    return {"p50": quantile(values, 0.5), "p99": quantile(values, 0.99)}


def _milliseconds(values: Iterable[float | None]) -> dict[str, float | None]:
    return _quantiles([1000.0 * value for value in values if value is not None])
