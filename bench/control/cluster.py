"""A live cluster with emulated nodes under a fixed load, and the CPU time of every process in it."""

import asyncio
import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.demo.event_log import read_event_log
from bench.live.client_process import ClientProcess
from bench.live.cpu import OTHERS, CpuMeter
from bench.live.errors import LiveError
from bench.live.plan_file import write_plan
from bench.live.requests import PlannedRequest
from bench.live.training_jobs import TrainingJobs, connect
from deploy.local.cluster import LocalCluster
from deploy.local.settings import LocalClusterConfig
from deploy.local.tiny_model import write_tiny_model

MODEL = "tiny"
_TOKENS = "abcdefghijklmnopqrstuvwxyz    "
_DRAIN_S = 30.0
_LEAD_S = 0.3
_SAMPLE_S = 0.5
#: After a phase, until what it caused has ended.
_SETTLE_S = 1.0
_PIECE_TOKENS = 128
_NUM_PIECES = 200
#: Seconds of one op on a stage, about those of the demo's model on a core (form, coefficients).
LATENCY: dict[str, dict[str, Any]] = {
    "prefill": {"form": "affine", "coefficients": [0.002, 1.0e-4]},
    "decode": {"form": "full_decode", "coefficients": [0.002, 0.0008, 1e-6]},
    "train_forward": {"form": "affine", "coefficients": [0.002, 8e-5]},
    "train_backward": {"form": "affine", "coefficients": [0.002, 1.6e-4]},
    "optimizer_step": {"form": "constant", "coefficients": [0.004]},
    "weight_sync": {"form": "constant", "coefficients": [0.01]},
}
#: Coarse: the durations above are all there is to find.
_GRID: dict[str, Any] = {
    "max_point_tokens": 512,
    "train": {"batches": [1, 2], "lengths": [32, 64, 128, 256]},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlConfig:
    """The cluster and its load. Lengths are lognormal, clipped."""

    nodes: int = 2
    stages: int = 1
    rate: float = 6.5
    #: Length of each phase.
    seconds: float = 20.0
    prompt_median: float = 208.0
    output_median: float = 16.0
    sigma: float = 0.5
    seed: int = 0
    #: Where the model, the profiles and the cluster lie.
    directory: Path = Path("out/bench/control")


@dataclass(frozen=True, slots=True)
class Phase:
    """One load. CPU seconds by role; what was done meanwhile."""

    name: str
    wall_s: float
    cpu_s: dict[str, float]
    requests: int = 0
    tokens: int = 0
    #: Finished ops of stages, by kind.
    ops: dict[str, int] = field(default_factory=dict)


def plan(config: ControlConfig) -> list[PlannedRequest]:
    """Poisson arrivals of random text; the same for the same seed."""
    rng = random.Random(config.seed)
    requests: list[PlannedRequest] = []
    at_s = rng.expovariate(config.rate)
    while at_s < config.seconds:
        prompt, output = (
            _clip(median * math.exp(config.sigma * rng.gauss(0.0, 1.0)), low, high)
            for median, low, high in ((config.prompt_median, 32, 384), (config.output_median, 4, 64))
        )
        text = "".join(rng.choices(_TOKENS, k=prompt))
        requests.append(PlannedRequest(f"control-{len(requests)}", at_s, text, "", output, "control"))
        at_s += rng.expovariate(config.rate)
    return requests


def _clip(value: float, low: int, high: int) -> int:
    return max(low, min(high, round(value)))


async def measure(config: ControlConfig) -> list[Phase]:
    """Start a cluster and put it through the phases: `idle`, `requests`, `training`. Raises LiveError."""
    directory = config.directory / "run"
    shutil.rmtree(directory, ignore_errors=True)  # a ledger from an earlier run would still hold its jobs
    model = config.directory / "model"
    if not (model / "config.json").is_file():
        write_tiny_model(model)
    event_log = directory / "events.jsonl"
    cluster = LocalCluster(
        LocalClusterConfig(
            model_path=model,
            directory=directory,
            num_nodes=config.nodes,
            num_stages=config.stages,
            model_name=MODEL,
            node={"engine": "emulated", "emulated_latency": LATENCY, "max_batch": 4},
            profiler={"grid": _GRID},
            profiles_directory=config.directory / "profiles",
            event_log=event_log,
        )
    )
    async with AsyncExitStack() as stack:
        stack.push_async_callback(cluster.stop)
        await cluster.start()
        bench = _Bench(config, cluster)
        await bench.warm_up()
        phases = [await bench.idle(), await bench.requests(), await bench.training()]
        starts = bench.starts_s
    return [_with_ops(phase, event_log, start_s) for phase, start_s in zip(phases, starts, strict=True)]


def _with_ops(phase: Phase, event_log: Path, start_s: float) -> Phase:
    log = read_event_log(event_log, start_s)
    if log.dropped:
        raise LiveError(f"the scheduler left {log.dropped} entries out of its event log")
    ops = Counter(str(op.op) for op in log.ops if 0.0 <= op.end_s < phase.wall_s)
    return replace(phase, ops=dict(ops))


class _Bench:
    def __init__(self, config: ControlConfig, cluster: LocalCluster) -> None:
        self._config = config
        self._cluster = cluster
        self.starts_s: list[float] = []

    async def warm_up(self) -> None:
        """Requests and training that do not count: connections, caches, imports."""
        few = [PlannedRequest(f"warm-{index}", 0.05 * index, "warm up " * 8, "", 8, "warm-up") for index in range(20)]
        await self._send("warm-up", few)
        async with _Training(self._cluster) as jobs:
            await jobs.begin()
            await asyncio.sleep(2.0)
        await asyncio.sleep(_SETTLE_S)

    async def idle(self) -> Phase:
        """Nothing to do but heartbeats and timers."""
        return await self._phase("idle", asyncio.sleep(self._config.seconds))

    async def requests(self) -> Phase:
        """Streamed completions alone."""
        phase = await self._phase("requests", self._send("requests", plan(self._config)))
        await asyncio.sleep(_SETTLE_S)
        return phase

    async def training(self) -> Phase:
        """A backlog of micro-batches of one example, a step each, on every node."""
        async with _Training(self._cluster) as jobs:
            await jobs.begin()
            await asyncio.sleep(_SETTLE_S)
            return await self._phase("training", asyncio.sleep(self._config.seconds))

    async def _phase(self, name: str, work: Coroutine[Any, Any, tuple[int, int] | None]) -> Phase:
        meter = CpuMeter()
        task = asyncio.ensure_future(work)
        processes = self._cluster.processes()
        begin_s = time.monotonic()
        self.starts_s.append(begin_s)
        meter.sample(processes)
        while not task.done():
            await asyncio.wait((task,), timeout=_SAMPLE_S)
            meter.sample(processes)
            self._cluster.check()
        wall_s = time.monotonic() - begin_s
        cpu_s = {role: value for role, value in meter.totals_s().items() if role != OTHERS}
        requests, tokens = task.result() or (0, 0)
        return Phase(name, wall_s, cpu_s, requests, tokens)

    async def _send(self, name: str, requests: Sequence[PlannedRequest]) -> tuple[int, int]:
        """Send through the REST API from a process of its own; (requests, tokens)."""
        path = self._config.directory / "run" / f"{name}.plan.jsonl"
        write_plan(path, url=self._cluster.url, model=MODEL, drain_s=_DRAIN_S, requests=requests)
        client = ClientProcess(path)
        try:
            await client.start()
            records = await client.run(time.monotonic() + _LEAD_S, lambda counts: None)
        finally:
            await client.stop()
        errors = [record.error for record in records if record.error]
        if errors:
            raise LiveError(f"{len(errors)} of {len(records)} requests failed: {errors[0]}")
        return len(records), sum(record.output_tokens for record in records)


class _Training:
    """A training job that runs until the block ends."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._jobs = TrainingJobs(connect(cluster.url), MODEL, batch_size=1, num_epochs=100, learning_rate=1e-4)
        self._job_id = ""

    async def __aenter__(self) -> "_Training":
        return self

    async def begin(self) -> None:
        """Upload the examples and start the job."""
        rng = random.Random(1)
        file_id = await self._jobs.upload("control.jsonl", list(_pieces(rng)))
        self._job_id = await self._jobs.start(file_id)

    async def __aexit__(self, *error: object) -> None:
        if self._job_id:
            await self._jobs.cancel(self._job_id)
        await self._jobs.close()


def _pieces(rng: random.Random) -> Iterable[str]:
    return ("".join(rng.choices(_TOKENS, k=_PIECE_TOKENS)) for _ in range(_NUM_PIECES))
