"""What one run came to: the row of the summary, and what the charts of a single run need."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from statistics import fmean, pstdev, pvariance
from typing import Any

from bench.paper.scenario import DECODE, HOLD_S, SLO_UNITS, Run, cluster, simulate, work
from services.simulator.clairvoyant import clairvoyant_node_s, demands
from services.simulator.figures import evaluate
from services.simulator.metrics import held_intervals, measure, quantile
from services.simulator.types import Request, SimulationResult

#: A micro-batch placed later than this after its arrival has waited.
_AT_ONCE_S = 1e-9


@dataclass(frozen=True, slots=True)
class Details:
    """What a chart of a single run needs: when each node was held, and the responses of its requests in order."""

    policy: str
    slo_s: float
    last_arrival_s: float
    held: dict[str, list[tuple[float, float]]]
    responses_s: list[float]


def row(run: Run) -> dict[str, Any]:
    """The published figures of one run."""
    point, result = run.point, simulate(run)
    metrics = measure(result, slo_s=SLO_UNITS * run.unit_s, hold_s=HOLD_S)
    kept = metrics.slo_attainment
    if run.mode == DECODE:
        kept = evaluate(result, slo=run.slo, hold_s=HOLD_S).slo_attainment
    bound_s = clairvoyant_node_s(demands(work(run), cluster(run)), HOLD_S) if run.has_bound else None
    whole = bound_s is not None and metrics.num_ok == metrics.num_tasks
    return {
        "mode": run.mode,
        "rate": point.rate,
        "training_share": point.training_share,
        "mean_forward_s": point.mean_forward_s,
        "policy": run.policy,
        "options": dict(run.options),
        "seed": run.seed,
        "n_tasks": metrics.num_tasks,
        "n_ok": metrics.num_ok,
        "n_requests": metrics.num_requests,
        "slo_units": SLO_UNITS,
        "tasks_per_node_s": metrics.tasks_per_node_s,
        "tasks_per_held_node_s": metrics.tasks_per_held_node_s,
        "slo_attainment": kept,
        "utilisation": metrics.utilisation,
        "held_node_s": metrics.held_node_s,
        "clairvoyant_node_s": bound_s,
        "efficiency": bound_s / metrics.held_node_s if whole and bound_s is not None else None,
        "nodes_used": metrics.nodes_used,
        "makespan_s": metrics.makespan_s,
        "response_p50_s": _finite(metrics.response_p50_s),
        "response_p99_s": _finite(metrics.response_p99_s),
        "mean_response_s": _mean(record.response_s for record in result.requests()),
        "worst_response_slos": _finite(metrics.worst_response_slos),
        "mean_training_response_s": metrics.mean_training_response_s,
        **_training_waits(result),
        **_nodes(run, result),
        "decisions": decisions(result),
        **(run.also(run, result) if run.also else {}),
    }


def details(run: Run) -> Details:
    """The same run again, with what the charts of a single point show."""
    result = simulate(run)
    return Details(
        run.policy,
        SLO_UNITS * run.unit_s,
        max(record.work.arrival_s for record in result.tasks.values()),
        held_intervals(result, HOLD_S),
        sorted(record.response_s for record in result.requests()),
    )


def decisions(result: SimulationResult) -> str:
    """Fingerprint of where every task went and when: two runs with the same one decided alike."""
    digest = blake2b(digest_size=8)
    for decision in result.decisions:
        digest.update(f"{decision.at_s!r} {decision.task_id} {decision.node_id}\n".encode())
    return digest.hexdigest()


def _training_waits(result: SimulationResult) -> dict[str, float]:
    """How long micro-batches waited for a node, for whatever reason, and what share of them did at all."""
    waits_s = sorted(r.assigned_s - r.work.arrival_s for r in result.microbatches() if r.assigned_s is not None)
    return {
        "training_waiting_share": sum(wait_s > _AT_ONCE_S for wait_s in waits_s) / max(1, len(waits_s)),
        "training_wait_p50_s": quantile(waits_s, 0.5),
        "training_wait_max_s": quantile(waits_s, 1.0),
    }


def _nodes(run: Run, result: SimulationResult) -> dict[str, float]:
    """How alike the prompts of a node are (variance within nodes over all), and how unevenly requests are spread."""
    lengths: dict[str, list[int]] = {f"node-{index}": [] for index in range(run.nodes)}
    for record in result.requests():
        if isinstance(record.work, Request) and record.node_id:
            lengths[record.node_id].append(record.work.prompt_tokens)
    everything = [length for group in lengths.values() for length in group]
    counts = [len(group) for group in lengths.values()]
    total = pvariance(everything) if everything else 0.0
    within = sum(len(group) * pvariance(group) for group in lengths.values() if group)
    return {
        "length_variance_within": within / (total * len(everything)) if total else 1.0,
        "load_skew": pstdev(counts) / fmean(counts) if everything else 0.0,
    }


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return _finite(fmean(known)) if known else None


def _finite(value: float) -> float | None:
    """None for the response of a request that never got one: JSON has no infinity."""
    return value if math.isfinite(value) else None
