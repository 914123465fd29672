"""One simulation: a cluster of nodes with profiles, traffic at a rate, and a backlog of training without end."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path

from bench.colocation.config import PROMISE_UNITS, ColocationConfig, Limits, Training
from bench.colocation.measure import Measured, measure
from services.latency import OpKind
from services.node_agent.core.types import NodeCoreConfig
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.tasks import SloTarget
from services.simulator.cluster import Simulation
from services.simulator.profile_file import Profile, read_profile
from services.simulator.trace_file import TraceRow
from services.simulator.trace_file import read_trace as read_rows
from services.simulator.traffic import WORKLOADS, CutTraffic, DrawnTraffic, RecordedTraffic
from services.simulator.types import Microbatch, Request, SimulationConfig, VirtualNode

WORKLOAD = "azure-conv"
#: Of the model. A prompt that leaves no room for its output loses its beginning, as a chat service cuts it.
CONTEXT_TOKENS = 4096
#: Mean lengths of the traffic that the promise is derived from (statistics of the published trace), tokens.
MEAN_PROMPT_TOKENS, MEAN_OUTPUT_TOKENS = 1155, 211
#: From a decision until the node has the task, and from an event until the scheduler knows: a call on a local network.
_CALL_S = 0.001
#: Output assumed until enough requests have ended.
INITIAL_OUTPUT_TOKENS = 211

profile = cache(read_profile)
_trace = cache(read_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one run depends on. profiles: a file per node. rate: requests per second; 0: nothing is served.

    is_told: the cluster is told the output of every request as its limit. An emulated cluster has to be: it has no
    end of a sequence. cut_overhead: share that cutting a training operation into pieces adds to it.
    """

    profiles: tuple[Path, ...]
    policy: str
    rate: float
    seed: int
    seconds: float
    trains: bool
    max_tokens: int
    limits: Limits
    training: Training
    trace: Path | None = None
    is_told: bool = False
    cut_overhead: float = 0.05
    options: tuple[tuple[str, float | bool], ...] = ()


def run_of(config: ColocationConfig, policy: str, rate: float, seed: int, *, trains: bool) -> Run:
    """On nodes alike."""
    return Run(
        profiles=(config.profile,) * config.nodes,
        policy=policy,
        rate=rate,
        seed=seed,
        seconds=config.seconds,
        trains=trains,
        max_tokens=config.max_tokens,
        limits=config.limits,
        training=config.training,
        trace=config.trace,
    )


def promise(*paths: Path) -> SloTarget:
    """What every request is promised on a cluster of nodes with these profiles: what the slowest of them can keep."""
    latencies = [profile(path).latency for path in set(paths)]
    context = MEAN_PROMPT_TOKENS + MEAN_OUTPUT_TOKENS / 2
    return SloTarget(
        PROMISE_UNITS * max(latency.node_s(OpKind.PREFILL, 1, MEAN_PROMPT_TOKENS) for latency in latencies),
        PROMISE_UNITS * max(latency.node_s(OpKind.DECODE, 1, context) for latency in latencies),
    )


def simulate(run: Run) -> Measured:
    """The figures of one run. Raises ValueError for a profile, trace or rate that makes no sense."""
    slo = promise(*run.profiles)
    core = CoreConfig(
        policy=run.policy,
        policy_options=dict(run.options),
        default_slo=slo,
        initial_output_tokens=INITIAL_OUTPUT_TOKENS,
        max_inflight_training=run.limits.max_inflight_training,
        sync_every_steps=run.training.sync_every_steps,
    )
    nodes = [_node(f"node-{index:02}", run.limits, profile(path)) for index, path in enumerate(run.profiles)]
    config = SimulationConfig(
        core=core,
        seed=run.seed,
        # Of every operation what its profile says.
        noise=None,
        dispatch_s=_CALL_S,
        report_s=_CALL_S,
        transfer_s=run.training.transfer_s,
        # A backlog never ends: without requests the run does. Whoever is not done by then has broken the promise.
        horizon_s=run.seconds + (_longest_s(slo, run.max_tokens) if run.rate else 0.0),
        cut_overhead=run.cut_overhead,
        keep_ops=True,
    )
    training = _backlog(run.training) if run.trains else None
    result = Simulation(config, nodes, requests(run, slo), training).run()
    return measure(result, {node.node_id: node.latency for node in nodes}, slo, run.seconds, run.training)


def _longest_s(slo: SloTarget, max_tokens: int) -> float:
    """What a request may take at most and keep its promise."""
    return (slo.ttft_s or 0.0) + max_tokens * (slo.tpot_s or 0.0)


def requests(run: Run, slo: SloTarget) -> list[Request]:
    """The traffic of a run; the same for every policy."""
    return [
        Request(
            f"r{index}",
            row.arrival_s,
            row.prompt_tokens,
            row.output_tokens,
            row.output_tokens if run.is_told else min(run.max_tokens, CONTEXT_TOKENS - row.prompt_tokens),
            slo,
            fixed_output=run.is_told,
        )
        for index, row in enumerate(rows(run))
    ]


def rows(run: Run) -> list[TraceRow]:
    """Arrivals and lengths."""
    if not run.rate:
        return []
    return [
        row._replace(prompt_tokens=min(row.prompt_tokens, CONTEXT_TOKENS - row.output_tokens)) for row in _drawn(run)
    ]


def _drawn(run: Run) -> list[TraceRow]:
    workload = WORKLOADS[WORKLOAD]
    if run.trace is None:
        drawn = DrawnTraffic(workload.shape, run.rate, run.seconds, workload.cv)
        return CutTraffic(drawn, run.max_tokens).draw(run.seed)
    recorded = _trace(run.trace)
    speed = run.rate * (recorded[-1].arrival_s - recorded[0].arrival_s) / len(recorded)
    found = CutTraffic(RecordedTraffic(recorded, speed), run.max_tokens).draw(run.seed)
    return _stretch(found, run.seed * run.seconds, run.seconds, len(recorded) / run.rate)


def _stretch(recorded: Sequence[TraceRow], begin_s: float, seconds: float, period_s: float) -> list[TraceRow]:
    """Requests of some seconds of a trace that begins anew after every `period_s`."""
    first_s = recorded[0].arrival_s
    found = []
    for turn in range(int(begin_s / period_s), int((begin_s + seconds) / period_s) + 1):
        at_s = turn * period_s - first_s - begin_s
        found += [row._replace(arrival_s=row.arrival_s + at_s) for row in recorded]
    return [row for row in found if 0.0 <= row.arrival_s < seconds]


def _node(node_id: str, limits: Limits, found: Profile) -> VirtualNode:
    core = NodeCoreConfig(
        num_stages=found.latency.num_stages,
        max_batch=limits.max_batch,
        max_prefill_tokens=limits.max_prefill_tokens,
        kv_capacity_tokens=limits.kv_capacity_tokens,
        kv_block_tokens=limits.kv_block_tokens,
        expected_output_tokens=limits.expected_output_tokens,
        max_inflight_training=limits.max_inflight_training,
        weight_handling=limits.weight_handling,
        gradient_buffers=limits.gradient_buffers,
    )
    return VirtualNode(
        node_id=node_id,
        latency=found.latency,
        core=core,
        max_inflight_inference=limits.max_inflight_inference,
        max_training_parts=limits.max_training_parts,
    )


def _backlog(training: Training) -> Iterator[Microbatch]:
    for index in count():
        yield Microbatch(f"m{index}", 0.0, "training", training.batch, training.length, training.accumulation)


def as_emulated(run: Run) -> Run:
    """What an emulated cluster does: it is told all lengths, and cutting costs its stages nothing."""
    return replace(run, is_told=True, cut_overhead=0.0)


def with_options(run: Run, **options: float | bool) -> Run:
    """The same with options of its policy."""
    return replace(run, options=tuple(sorted({**dict(run.options), **options}.items())))
