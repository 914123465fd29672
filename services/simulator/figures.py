"""The figures a plan is made from, in the definitions of the published metrics; see `metrics`."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from services.latency import OpKind
from services.scheduler.core.tasks import SloTarget
from services.simulator.metrics import measure, quantile
from services.simulator.overload import Queue, queue_of
from services.simulator.types import Microbatch, Request, SimulationResult, TaskRecord

_TRAINING = (OpKind.TRAIN_FORWARD, OpKind.TRAIN_BACKWARD, OpKind.OPTIMIZER_STEP, OpKind.WEIGHT_SYNC)


@dataclass(frozen=True, slots=True)
class NodeLoad:
    """What one node did. Shares of its stages' time from 0 to the end of the run, 0-1."""

    node_id: str
    requests: int
    microbatches: int
    serving_share: float
    training_share: float


@dataclass(frozen=True, slots=True)
class Figures:
    """One run. Times infinite: that many requests never got so far. Attainment: TTFT and TPOT both kept.

    num_unfinished: requests neither answered nor rejected at the end. trained_tokens_per_s: over the whole run.
    """

    num_requests: int
    num_rejected: int
    num_unfinished: int
    slo_attainment: float
    ttft_p50_s: float
    ttft_p95_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    tasks_per_held_node_s: float
    held_node_s: float
    nodes_used: int
    utilisation: float
    output_tokens_per_s: float
    trained_tokens_per_s: float
    ended_s: float
    nodes: tuple[NodeLoad, ...]
    queue: Queue

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is infinite is None, for JSON has no infinity."""
        plain = asdict(self)
        plain["nodes"] = list(plain["nodes"])
        return {key: None if value == math.inf else value for key, value in plain.items()}


class Spread(NamedTuple):
    """A figure over several seeds."""

    median: float
    lowest: float
    highest: float


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


def evaluate(result: SimulationResult, *, slo: SloTarget, hold_s: float) -> Figures:
    """Figures of a run whose requests were promised `slo`, on nodes held for `hold_s` after their last task."""
    requests = list(result.requests())
    measured = measure(result, slo_s=math.inf, hold_s=hold_s)
    ttfts = sorted(ttft_s(record) for record in requests)
    tpots = sorted(tpot_s(record) for record in requests)
    elapsed_s = result.ended_s or math.inf
    output = sum(r.work.output_tokens for r in requests if r.ok and isinstance(r.work, Request))
    trained = sum(
        r.work.batch * r.work.length for r in result.microbatches() if r.ok and isinstance(r.work, Microbatch)
    )
    return Figures(
        num_requests=len(requests),
        num_rejected=sum(record.outcome == "rejected" for record in requests),
        num_unfinished=sum(not record.outcome for record in requests),
        slo_attainment=sum(_kept(record, slo) for record in requests) / len(requests) if requests else 1.0,
        ttft_p50_s=quantile(ttfts, 0.5),
        ttft_p95_s=quantile(ttfts, 0.95),
        ttft_p99_s=quantile(ttfts, 0.99),
        tpot_p50_s=quantile(tpots, 0.5),
        tpot_p99_s=quantile(tpots, 0.99),
        tasks_per_held_node_s=measured.tasks_per_held_node_s,
        held_node_s=measured.held_node_s,
        nodes_used=measured.nodes_used,
        utilisation=measured.utilisation,
        output_tokens_per_s=output / elapsed_s,
        trained_tokens_per_s=trained / elapsed_s,
        ended_s=result.ended_s,
        nodes=_loads(result),
        queue=queue_of(requests),
    )


def ttft_s(record: TaskRecord) -> float:
    """From the arrival of a request to its first token; infinite when it was not answered to the end."""
    if not record.ok or record.first_token_s is None:
        return math.inf
    return record.first_token_s - record.work.arrival_s


def tpot_s(record: TaskRecord) -> float:
    """Mean time per token after the first; 0 for an answer of one token, infinite without an answer to the end."""
    if not record.ok or record.first_token_s is None or record.ended_s is None or not isinstance(record.work, Request):
        return math.inf
    return (record.ended_s - record.first_token_s) / max(1, record.work.output_tokens - 1)


def _kept(record: TaskRecord, slo: SloTarget) -> bool:
    """Whether the promise was kept; a part that is None was not promised, but an answer always is."""
    ttft, tpot = ttft_s(record), tpot_s(record)
    if ttft == math.inf:
        return False
    return (slo.ttft_s is None or ttft <= slo.ttft_s) and (slo.tpot_s is None or tpot <= slo.tpot_s)


def _loads(result: SimulationResult) -> tuple[NodeLoad, ...]:
    busy_s: dict[str, list[tuple[float, float]]] = {}
    for (node_id, _), use in result.stages.items():
        training_s = sum(use.busy_s.get(kind, 0.0) for kind in _TRAINING)
        busy_s.setdefault(node_id, []).append((sum(use.busy_s.values()) - training_s, training_s))
    counts: dict[str, list[int]] = {node_id: [0, 0] for node_id in busy_s}
    for record in result.tasks.values():
        if record.node_id in counts:
            counts[record.node_id][isinstance(record.work, Microbatch)] += 1
    return tuple(
        NodeLoad(
            node_id,
            counts[node_id][0],
            counts[node_id][1],
            sum(serving_s for serving_s, _ in stages) / len(stages) / result.ended_s,
            sum(training_s for _, training_s in stages) / len(stages) / result.ended_s,
        )
        for node_id, stages in sorted(busy_s.items())
    )
