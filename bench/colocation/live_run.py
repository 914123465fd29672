"""The same runs on an emulated cluster: every service is real, only the stages take the time that a profile says.

`time_scale` multiplies operations, arrivals, promises and every setting in seconds; figures are told as at scale 1.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.colocation.config import Limits
from bench.colocation.measure import Measured, solo_work_s
from bench.colocation.scenario import INITIAL_OUTPUT_TOKENS, Run, profile, promise, rows
from bench.fidelity import log
from bench.fidelity.workloads import letters
from bench.live.emulated import clock_slip, emulated_cluster
from bench.live.requests import PlannedRequest, RequestRecord, Status
from bench.live.run import Backlog, Sent, send
from bench.machine import usable_cores
from deploy.local.cluster import LocalCluster
from services.latency import NodeLatency, OpKind
from services.node_agent.core.types import NodeCoreConfig
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import OpFinished, TaskArrived, TaskEnded
from services.scheduler.core.tasks import SloTarget, TrainingTask
from services.scheduler.explain.log_file import Step
from services.simulator.metrics import quantile

#: Texts of the backlog, each of them a micro-batch that is trained over and over.
_TEXTS, _EPOCHS = 64, 1000
_DRAIN_S = 60.0
_START_TIMEOUT_S = 180.0
_SERVING = (OpKind.PREFILL, OpKind.DECODE)
#: Options of policies that are seconds, with their defaults.
_SECONDS: dict[str, dict[str, float]] = {"lemix": {"dwell_s": 1.0, "backlog_s": 12.0}}
#: Settings of the core that are seconds.
_CORE_SECONDS = ("max_hold_back_s", "hold_s", "sync_timeout_s")
#: Those of a node's core; promises come with the requests, and memory has no limit.
_NODE_SECONDS = ("max_training_wait_s", "group_timeout_s", "max_demotion_s")


@dataclass(frozen=True, slots=True)
class LiveRun:
    """What came of a run on a live cluster.

    clock_slip_p99: share of its own time by which the end of an operation was noticed late, 99th percentile of the
    worst node. clock_slip: all lateness by all time. wake_priority: see `ClockSlip`. cpu_share: of the machine's CPU
    time, by role.
    """

    measured: Measured
    clock_slip_p99: float
    clock_slip: float
    wake_priority: str
    cpu_share: dict[str, float]
    problems: list[str]


async def measure_live(
    run: Run,
    directory: Path,
    time_scale: float,
    on_progress: Callable[[float], None],
    drain_s: float = _DRAIN_S,
) -> LiveRun:
    """Start a cluster, run traffic and training on it, stop it. Raises LiveError, ClusterError.

    drain_s: at scale 1; after the last arrival every answer must be there within so many seconds.
    """
    slo = _scaled(promise(*run.profiles), time_scale)
    events = directory / "events.jsonl"
    config = emulated_cluster(
        directory,
        profiles=run.profiles,
        time_scale=time_scale,
        policy=run.policy,
        core=core_settings(run, slo, time_scale),
        node=node_settings(run.limits, time_scale),
        event_log=events,
        start_timeout_s=_START_TIMEOUT_S,
    )
    cluster = LocalCluster(config)
    try:
        await cluster.start()
        sent = await send(
            cluster,
            planned(run, time_scale),
            seconds=run.seconds * time_scale,
            drain_s=drain_s * time_scale,
            plan=directory / "plan.jsonl",
            backlog=_backlog(run) if run.trains else None,
            on_progress=lambda at_s, counts: on_progress(at_s),
        )
    finally:
        await cluster.stop()
    slip = clock_slip(directory)
    _, steps = log.read(events)
    latencies = {f"node-{index}": profile(path).latency for index, path in enumerate(run.profiles)}
    measured = figures(run, sent, steps, latencies, slo, time_scale)
    cpu_time_s = sent.wall_s * usable_cores()
    shares = {role: used_s / cpu_time_s for role, used_s in sorted(sent.cpu_s.items())}
    return LiveRun(measured, slip.p99, slip.total, slip.wake_priority, shares, _problems(sent.records))


def core_settings(run: Run, slo: SloTarget, time_scale: float) -> dict[str, Any]:
    """Settings of the scheduler's core, with every second `time_scale` times as long."""
    options = {name: value * time_scale for name, value in _SECONDS.get(run.policy, {}).items()}
    defaults = CoreConfig()
    return {
        "policy_options": {**options, **dict(run.options)},
        "default_slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s},
        "initial_output_tokens": INITIAL_OUTPUT_TOKENS,
        "max_inflight_training": run.limits.max_inflight_training,
        "sync_every_steps": run.training.sync_every_steps,
        **{name: getattr(defaults, name) * time_scale for name in _CORE_SECONDS},
    }


def node_settings(limits: Limits, time_scale: float) -> dict[str, Any]:
    """Settings of every node agent, with every second of its core `time_scale` times as long."""
    defaults = NodeCoreConfig(num_stages=1)
    return {
        **asdict(limits),
        "max_queued_training": 2 * limits.max_inflight_training,
        **{name: getattr(defaults, name) * time_scale for name in _NODE_SECONDS},
    }


def planned(run: Run, time_scale: float) -> list[PlannedRequest]:
    """The traffic of a run: as many random letters as a prompt has tokens, one token each."""
    rng = random.Random(f"{run.seed}/letters")
    return [
        PlannedRequest(
            f"r{index}", row.arrival_s * time_scale, letters(rng, row.prompt_tokens), "", row.output_tokens, ""
        )
        for index, row in enumerate(rows(run))
    ]


def figures(
    run: Run,
    sent: Sent,
    steps: Sequence[Step],
    latencies: dict[str, NodeLatency],
    slo: SloTarget,
    time_scale: float,
) -> Measured:
    """What a run was worth, in seconds at scale 1; see `measure`. Latencies are those that the client saw."""
    end_s = sent.start_s + run.seconds * time_scale
    serving_s = training_s = 0.0
    tokens, work_s = 0, 0.0
    microbatches: set[str] = set()
    for step in steps:
        event = step.event
        if isinstance(event, OpFinished):
            taken_s = max(0.0, min(event.end_s, end_s) - max(event.begin_s, sent.start_s)) / time_scale
            if event.op in _SERVING:
                serving_s += taken_s
            else:
                training_s += taken_s
        elif isinstance(event, TaskArrived) and isinstance(event.task, TrainingTask):
            microbatches.add(event.task.task_id)
        elif isinstance(event, TaskEnded) and event.ok and event.task_id in microbatches:
            is_inside = sent.start_s <= step.now_s <= end_s
            tokens += is_inside * run.training.tokens
            work_s += is_inside * solo_work_s(latencies[event.node_id], run.training)
    records = sent.records
    ttfts = sorted(_ttft_s(record) / time_scale for record in records)
    tpots = sorted(_tpot_s(record) / time_scale for record in records)
    ages = sorted(_age_s(record) / time_scale for record in records if record.first_token_s is not None)
    return Measured(
        seconds=run.seconds,
        num_requests=len(records),
        num_kept=sum(_is_kept(record, slo) for record in records),
        num_rejected=sum(record.status is Status.REJECTED for record in records),
        ttft_p50_s=quantile(ttfts, 0.5),
        ttft_p99_s=quantile(ttfts, 0.99),
        tpot_p50_s=quantile(tpots, 0.5),
        tpot_p99_s=quantile(tpots, 0.99),
        stage_s=run.seconds * sum(latency.num_stages for latency in latencies.values()),
        serving_s=serving_s,
        training_s=training_s,
        trained_tokens=tokens,
        trained_work_s=work_s,
        staleness_p50_s=quantile(ages, 0.5) if tokens else None,
        staleness_p99_s=quantile(ages, 0.99) if tokens else None,
    )


def _backlog(run: Run) -> Backlog:
    rng = random.Random(f"{run.seed}/backlog")
    texts = [letters(rng, run.training.length) for _ in range(_TEXTS)]
    return Backlog(
        texts=texts, batch_size=run.training.batch, accumulation=run.training.accumulation, num_epochs=_EPOCHS
    )


def _scaled(slo: SloTarget, time_scale: float) -> SloTarget:
    return SloTarget((slo.ttft_s or 0.0) * time_scale, (slo.tpot_s or 0.0) * time_scale)


def _ttft_s(record: RequestRecord) -> float:
    ttft_s = record.ttft_s
    return float("inf") if ttft_s is None or record.status is not Status.OK else ttft_s


def _tpot_s(record: RequestRecord) -> float:
    if record.status is not Status.OK:
        return float("inf")
    return 0.0 if record.tpot_s is None else record.tpot_s


def _age_s(record: RequestRecord) -> float:
    """Of weights that were never trained: the time since the begin."""
    return (record.first_token_s or 0.0) if record.staleness_s is None else record.staleness_s


def _is_kept(record: RequestRecord, slo: SloTarget) -> bool:
    return _ttft_s(record) <= (slo.ttft_s or 0.0) and _tpot_s(record) <= (slo.tpot_s or 0.0)


def _problems(records: Sequence[RequestRecord]) -> list[str]:
    bad = [record for record in records if record.status not in (Status.OK, Status.REJECTED)]
    return [f"{record.request_id} {record.status.value}: {record.error}" for record in bad]
