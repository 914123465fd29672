"""What came of one simulation, between its begin and the last arrival: the definitions behind every figure. Pure."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bench.colocation.config import Training
from services.latency import NodeLatency, OpKind
from services.scheduler.core.tasks import SloTarget
from services.simulator.cluster import APPLY, SNAPSHOT
from services.simulator.figures import evaluate
from services.simulator.metrics import quantile
from services.simulator.types import OpRecord, SimulationResult

_SERVING = (OpKind.PREFILL, OpKind.DECODE)


@dataclass(frozen=True, slots=True)
class Measured:
    """One run. Stage seconds and trained tokens are those of the `seconds` that requests arrive in.

    num_kept: requests whose TTFT and TPOT were both kept, of all; failed and rejected ones are misses. stage_s: time of
    all stages. trained_work_s: what the trained tokens take alone and whole. staleness_s: age of the weights that
    computed a first token (never trained: time since the begin), None: nothing was served or trained.
    """

    seconds: float
    num_requests: int
    num_kept: int
    num_rejected: int
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    stage_s: float
    serving_s: float
    training_s: float
    trained_tokens: int
    trained_work_s: float
    staleness_p50_s: float | None
    staleness_p99_s: float | None

    @property
    def idle_s(self) -> float:
        """Stage time that serving left."""
        return self.stage_s - self.serving_s


def measure(
    result: SimulationResult,
    latencies: Mapping[str, NodeLatency],
    slo: SloTarget,
    seconds: float,
    training: Training,
) -> Measured:
    """The figures of a run that kept its operations."""
    figures = evaluate(result, slo=slo, hold_s=0.0)
    serving_s = training_s = 0.0
    for op in result.ops:
        taken_s = max(0.0, min(op.end_s, seconds) - op.begin_s)
        if op.kind in _SERVING:
            serving_s += taken_s
        else:
            training_s += taken_s
    tokens, work_s = 0, 0.0
    for record in result.microbatches():
        if record.ok and record.ended_s is not None and record.ended_s <= seconds:
            tokens += training.tokens
            work_s += solo_work_s(latencies[record.node_id], training)
    ages = sorted(staleness(result)) if tokens else []
    return Measured(
        seconds=seconds,
        num_requests=figures.num_requests,
        num_kept=round(figures.slo_attainment * figures.num_requests),
        num_rejected=figures.num_rejected,
        ttft_p50_s=figures.ttft_p50_s,
        ttft_p99_s=figures.ttft_p99_s,
        tpot_p50_s=figures.tpot_p50_s,
        tpot_p99_s=figures.tpot_p99_s,
        stage_s=seconds * sum(latency.num_stages for latency in latencies.values()),
        serving_s=serving_s,
        training_s=training_s,
        trained_tokens=tokens,
        trained_work_s=work_s,
        staleness_p50_s=quantile(ages, 0.5) if ages else None,
        staleness_p99_s=quantile(ages, 0.99) if ages else None,
    )


def solo_work_s(latency: NodeLatency, training: Training) -> float:
    """Stage seconds of a micro-batch that has its node alone, uncut, with its part of the optimizer step."""
    batch, length = training.batch, training.length
    passes_s = latency.node_s(OpKind.TRAIN_FORWARD, batch, length) + latency.node_s(
        OpKind.TRAIN_BACKWARD, batch, length
    )
    return passes_s + latency.node_s(OpKind.OPTIMIZER_STEP, 1, 1) / training.accumulation


def staleness(result: SimulationResult) -> list[float]:
    """Per first token, how long ago the newest optimizer step in its node's weights was made, by whatever node."""
    tops: dict[str, int] = {}
    for node_id, stage in result.stages:
        tops[node_id] = max(stage, tops.get(node_id, 0))
    changes = [op for op in result.ops if op.stage == tops[op.node_id]]
    events = _weights(changes)
    firsts = sorted((r.first_token_s, r.node_id) for r in result.requests() if r.first_token_s is not None)
    ages, place, newest_s = [], 0, dict.fromkeys(tops, 0.0)
    for at_s, node_id in firsts:
        while place < len(events) and events[place][0] <= at_s:
            _, changed, made_s = events[place]
            newest_s[changed] = max(newest_s[changed], made_s)
            place += 1
        ages.append(at_s - newest_s[node_id])
    return ages


def _weights(ops: Iterable[OpRecord]) -> list[tuple[float, str, float]]:
    """(when, node, when the newest step was made) of every change of a node's weights, in order."""
    newest_s: dict[str, float] = {}
    shared_s: dict[str, float] = {}
    found = []
    for op in sorted(ops, key=lambda op: op.end_s):
        if op.kind is OpKind.OPTIMIZER_STEP:
            newest_s[op.node_id] = op.end_s
        elif op.subject.endswith(SNAPSHOT):
            name = op.subject.removesuffix(SNAPSHOT)
            shared_s[name] = max(shared_s.get(name, 0.0), newest_s.get(op.node_id, 0.0))
            continue
        elif op.subject.endswith(APPLY):
            shared = shared_s.get(op.subject.removesuffix(APPLY), 0.0)
            newest_s[op.node_id] = max(newest_s.get(op.node_id, 0.0), shared)
        else:
            continue
        found.append((op.end_s, op.node_id, newest_s[op.node_id]))
    return found


def pooled(values: Iterable[float | None]) -> float | None:
    """Mean over the runs that have it; None: none has, or it is infinite in one."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and math.inf not in known else None
