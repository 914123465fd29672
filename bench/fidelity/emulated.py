"""Workloads on an emulated cluster with all its services, and the same in the simulator."""

import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple

from bench.fidelity import compare, delays, log
from bench.fidelity.config import FidelityConfig
from bench.fidelity.live import MODEL_NAME, Cluster, Run, started
from bench.fidelity.simulated import Truth, simulate
from bench.fidelity.workloads import Lengths, Workload, arrivals, capacity_rps, letters, request
from bench.live import emulated as live_emulated
from bench.live.requests import PlannedRequest
from bench.live.run import Backlog
from deploy.local.emulated_model import emulated_node
from lemix.internal.v1 import profile_pb2
from services.latency import NodeLatency
from services.profile_artifact import write_artifact
from services.profile_messages import latency_from_profile
from services.scheduler.core.tasks import SloTarget
from services.simulator.scenario import slo_of_units
from services.simulator.trace_file import TraceRow

ARTIFACT = Path(__file__).resolve().parents[2] / "deploy" / "profiles" / "a100-llama-2-7b.json"
#: Micro-batches of the backlog.
_TRAINING_TOKENS = 512
_TRAINING_TEXTS = 32
_SAMPLE = 4000


class Outcome(NamedTuple):
    """One workload: the entry of the summary, and what went wrong."""

    entry: dict[str, Any]
    problems: list[str]


class _Pair(NamedTuple):
    """A live run and its simulation. details: of the live run, for the summary."""

    live: compare.Figures
    simulated: compare.Figures
    details: dict[str, Any]
    problems: list[str]


class EmulatedCluster:
    """Runs workloads, each on a cluster of its own."""

    def __init__(self, config: FidelityConfig, model: Path) -> None:
        self._config = config
        self._model = model
        self._profile = scaled_profile(ARTIFACT, config.emulated.time_scale)
        self._latency: NodeLatency = latency_from_profile(self._profile)

    async def run(self, workload: Workload, on_progress: Callable[[float], None]) -> Outcome:
        """Live, then simulated. Where the two differ, twice more: which of two requests comes first by a millisecond
        may decide who waits from then on, and medians say more than one run. Raises LiveError or ClusterError when it
        could not be carried through."""
        emulated = self._config.emulated
        requests, slo, rate = self._plan(workload)
        run = Run(
            name=workload.name,
            requests=requests,
            warmup=self._warmup(workload),
            seconds=emulated.seconds,
            drain_s=self._config.drain_s,
            backlog=self._backlog() if workload.trains else None,
        )
        pairs = [await self._pair(workload, run, slo, on_progress)]
        first = compare.compare(pairs[0].live, pairs[0].simulated)
        if not compare.agrees(first):
            pairs += [await self._pair(workload, run, slo, on_progress) for _ in range(emulated.runs_in_doubt - 1)]
        live = compare.median([pair.live for pair in pairs])
        simulated = compare.median([pair.simulated for pair in pairs])
        entry = {
            "workload": workload.name,
            "title": workload.title,
            "rate_rps": rate,
            **compare.compare(live, simulated),
            "runs": len(pairs),
            "live": live.to_json(),
            "simulated": simulated.to_json(),
            "slo_ms": {"ttft": 1000.0 * (slo.ttft_s or 0.0), "tpot": 1000.0 * (slo.tpot_s or 0.0)},
            **pairs[0].details,
        }
        if len(pairs) > 1:
            entry["first_run"] = first
            entry["live_spread"] = compare.spread([pair.live for pair in pairs])
            entry["simulated_spread"] = compare.spread([pair.simulated for pair in pairs])
        return Outcome(entry, [problem for pair in pairs for problem in pair.problems])

    async def _pair(
        self, workload: Workload, run: Run, slo: SloTarget, on_progress: Callable[[float], None]
    ) -> "_Pair":
        async with AsyncExitStack() as stack:
            cluster = await started(stack, self._config, self._cluster(workload, slo))
            done = await cluster.run(run, on_progress)
        live, _ = log.read(done.event_log)
        end_s = done.start_s + self._config.emulated.seconds
        measured = delays.measure(live, done.start_s)
        simulated = simulate(live, done.start_s + done.wall_s, measured, Truth())
        lost = [f"{node_id} was lost" for node_id in live.lost_before(end_s)]
        details = {
            "delays_ms": {name: 1000.0 * value for name, value in measured._asdict().items()},
            "op_slip": compare.op_slip(live, done.start_s, end_s),
            "client": done.client_figures(),
            "cpu_share": done.cpu_share,
        }
        return _Pair(
            compare.figures(live, done.start_s, end_s, slo),
            compare.figures(simulated, done.start_s, end_s, slo),
            details,
            [f"{workload.name}: {text}" for text in (*done.problems, *lost)],
        )

    def _plan(self, workload: Workload) -> tuple[list[PlannedRequest], SloTarget, float]:
        config, emulated = self._config, self._config.emulated
        rng = random.Random(f"{config.seed}/{workload.name}")
        sample = [workload.draw(rng) for _ in range(_SAMPLE)]
        rate = workload.load * emulated.nodes * capacity_rps(self._latency, sample, max_batch=emulated.max_batch)
        times = arrivals(rng, rate, emulated.seconds, cv=workload.cv)
        rows = [TraceRow(0.0, item.prompt, item.output) for item in sample]
        requests = [
            request(f"{workload.name}-{index}", at_s, workload.draw(rng), rng) for index, at_s in enumerate(times)
        ]
        return requests, slo_of_units(config.slo_units, self._latency, rows), rate

    def _warmup(self, workload: Workload) -> list[PlannedRequest]:
        rng = random.Random(f"{self._config.seed}/{workload.name}/warmup")
        count = self._config.emulated.warmup_requests
        return [request(f"warmup-{index}", 0.1 * index, Lengths(64, 8), rng) for index in range(count)]

    def _backlog(self) -> Backlog:
        rng = random.Random(f"{self._config.seed}/backlog")
        return Backlog(texts=[letters(rng, _TRAINING_TOKENS) for _ in range(_TRAINING_TEXTS)])

    def _cluster(self, workload: Workload, slo: SloTarget) -> Cluster:
        emulated = self._config.emulated
        profile = self._config.out / "emulated-profile.json"
        profile.parent.mkdir(parents=True, exist_ok=True)
        profile.write_text(write_artifact(self._profile), encoding="utf-8")
        return Cluster(
            name=f"emulated-{workload.name}",
            model=self._model,
            nodes=emulated.nodes,
            stages=emulated.stages,
            core={"default_slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s}, "sync": "none"},
            scheduler={"profile_path": str(profile.resolve())},
            node={
                **emulated_node(ARTIFACT, emulated.time_scale),
                # With the profile's spread two runs of either differ by 9 % in TTFT p95: what is compared is the rest.
                "emulated_noise": False,
                "max_batch": emulated.max_batch,
                **workload.node,
            },
        )


def scaled_profile(path: Path, scale: float) -> profile_pb2.Profile:
    """A profile `scale` times as slow, of this benchmark's model: what its nodes of that `time_scale` do. Raises
    LiveError for a file that is no profile."""
    profile = live_emulated.scaled_profile(live_emulated.read_profile(path), scale)
    profile.model = MODEL_NAME
    return profile
