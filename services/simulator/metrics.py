"""What a run was worth: the definitions of the published metrics, computed from what happened and nothing else.

Shares are 0-1. A request that failed, was rejected or did not end is a miss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from services.simulator.types import SimulationResult


@dataclass(frozen=True, slots=True)
class Metrics:
    """tasks_per_node_s: tasks / sum of node spans (the paper's throughput). tasks_per_held_node_s: tasks / held time.

    worst_response_slos: the latest response in multiples of its promise. makespan_s: end of the last task.
    """

    num_tasks: int
    num_requests: int
    num_ok: int
    slo_attainment: float
    tasks_per_node_s: float
    tasks_per_held_node_s: float
    held_node_s: float
    nodes_used: int
    utilisation: float
    response_p50_s: float
    response_p99_s: float
    worst_response_slos: float
    makespan_s: float
    trained_tasks: int
    mean_training_response_s: float


def measure(result: SimulationResult, *, slo_s: float, hold_s: float) -> Metrics:
    """Metrics of a run whose requests were promised a response within `slo_s` (infinite: no promise)."""
    requests = list(result.requests())
    trained = [record for record in result.microbatches() if record.ok]
    num_ok = sum(record.ok for record in result.tasks.values())
    responses = sorted(record.response_s for record in requests)
    held_s = held_node_s(result, hold_s)
    spans_s = _node_spans_s(result)
    span_s = sum(spans_s.values())
    waited_s = [record.response_s for record in trained]
    return Metrics(
        num_tasks=len(result.tasks),
        num_requests=len(requests),
        num_ok=num_ok,
        slo_attainment=sum(r <= slo_s for r in responses if r < math.inf) / len(requests) if requests else 1.0,
        tasks_per_node_s=num_ok / span_s if span_s > 0.0 else 0.0,
        tasks_per_held_node_s=num_ok / held_s if held_s > 0.0 else 0.0,
        held_node_s=held_s,
        nodes_used=len(spans_s),
        utilisation=_utilisation(result),
        response_p50_s=quantile(responses, 0.5),
        response_p99_s=quantile(responses, 0.99),
        worst_response_slos=(responses[-1] / slo_s) if responses else 0.0,
        makespan_s=max((r.ended_s for r in result.tasks.values() if r.ended_s is not None), default=0.0),
        trained_tasks=len(trained),
        mean_training_response_s=sum(waited_s) / len(waited_s) if waited_s else 0.0,
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value that `share` of the sorted values do not exceed; 0 for none."""
    if not ordered:
        return 0.0
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def held_node_s(result: SimulationResult, hold_s: float) -> float:
    """Held time of all nodes: a node is held from an assignment until it has been idle for `hold_s`."""
    return sum(end_s - begin_s for held in held_intervals(result, hold_s).values() for begin_s, end_s in held)


def held_intervals(result: SimulationResult, hold_s: float) -> dict[str, list[tuple[float, float]]]:
    """When every used node was held: the union of its tasks' stays, each prolonged by `hold_s`, the last in full."""
    by_node: dict[str, list[tuple[float, float]]] = {}
    for stay in result.stays:
        by_node.setdefault(stay.node_id, []).append((stay.begin_s, min(stay.end_s, result.ended_s)))
    return {node_id: _union(by_node[node_id], hold_s) for node_id in sorted(by_node)}


def _union(stays: list[tuple[float, float]], hold_s: float) -> list[tuple[float, float]]:
    held: list[tuple[float, float]] = []
    for begin_s, end_s in sorted(stays):
        until_s = end_s + hold_s
        if held and begin_s <= held[-1][1]:
            held[-1] = (held[-1][0], max(held[-1][1], until_s))
        else:
            held.append((begin_s, until_s))
    return held


def _node_spans_s(result: SimulationResult) -> dict[str, float]:
    begins: dict[str, float] = {}
    ends: dict[str, float] = {}
    for (node_id, _), use in result.stages.items():
        if use.first_begin_s is not None and use.last_end_s is not None:
            begins[node_id] = min(begins.get(node_id, math.inf), use.first_begin_s)
            ends[node_id] = max(ends.get(node_id, 0.0), use.last_end_s)
    return {node_id: ends[node_id] - begins[node_id] for node_id in begins}


def _utilisation(result: SimulationResult) -> float:
    """Busy share of the spans in which stages were used."""
    busy_s = span_s = 0.0
    for use in result.stages.values():
        if use.first_begin_s is not None and use.last_end_s is not None:
            busy_s += sum(use.busy_s.values())
            span_s += use.last_end_s - use.first_begin_s
    return busy_s / span_s if span_s > 0.0 else 0.0
