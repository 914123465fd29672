"""The real CPU engine: predictions of operations and responses, and the simulator beside it."""

import math
import random
import shutil
import statistics
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from bench.demo.profile import newest_profile
from bench.fidelity import accuracy, compare, delays, log, ops
from bench.fidelity.config import FidelityConfig, RealConfig
from bench.fidelity.live import Cluster, Done, Run, Started, started
from bench.fidelity.simulated import Truth, simulate
from bench.fidelity.trace import Trace
from bench.fidelity.workloads import Lengths, arrivals, capacity_rps, letters, request
from bench.live.requests import PlannedRequest
from bench.live.run import Backlog
from deploy.local.tiny_model import write_tiny_model
from lemix.internal.v1 import profile_pb2
from services.latency import NodeLatency
from services.profile_messages import latency_from_profile
from services.scheduler.core.tasks import SloTarget
from services.simulator.scenario import slo_of_units
from services.simulator.trace_file import TraceRow

SERVING, TRAINING = "serving", "training"
#: What cutting a micro-batch into pieces adds on the real engine; the simulator's own default.
_CUT_OVERHEAD = 0.05
#: Mean |x| of a normal distribution, in standard deviations.
_MEAN_DEVIATION = math.sqrt(2.0 / math.pi)
_FLOOR_SEEDS = 4
_TRAINING_TEXTS = 24
_MOST_POINTS = 600


class Measured(NamedTuple):
    """One run: errors of predictions, the simulator beside it, points of the plots, problems."""

    predictions: dict[str, Any]
    simulator: dict[str, Any]
    points: dict[str, list[list[float]]]
    problems: list[str]


class RealCluster:
    """Profiles a cluster, then runs the same kind of traffic without and with training."""

    def __init__(self, config: FidelityConfig, model: Path) -> None:
        self._config = config
        self._model = model
        self._profiles = config.out / "profiles"
        self._slo = SloTarget()

    async def profile(self) -> profile_pb2.Profile:
        """Measure the nodes, as they are now. Raises LiveError, ClusterError."""
        shutil.rmtree(self._profiles, ignore_errors=True)
        async with AsyncExitStack() as stack:
            await self._start(stack, "profile")
        return newest_profile(self._profiles, self._config.real.stages)

    async def run(self, name: str, profile: profile_pb2.Profile, on_progress: Callable[[float], None]) -> Measured:
        """One run, `SERVING` or `TRAINING`. Raises LiveError, ClusterError."""
        real = self._config.real
        latency = latency_from_profile(profile)
        requests, self._slo = self._plan(name, latency)
        run = Run(
            name=name,
            requests=requests,
            warmup=self._warmup(),
            seconds=real.seconds,
            drain_s=self._config.drain_s,
            backlog=self._backlog() if name == TRAINING else None,
        )
        async with AsyncExitStack() as stack:
            cluster = await self._start(stack, name)
            done = await cluster.run(run, on_progress)
        return self._measured(name, done)

    def _measured(self, name: str, done: Done) -> Measured:
        real = self._config.real
        live, steps = log.read(done.event_log)
        end_s = done.start_s + real.seconds
        samples = [item for item in ops.samples(live.config, steps) if done.start_s <= item.at_s < end_s]
        measured = delays.measure(live, done.start_s)
        truth = Truth(noise=None, cut_overhead=_CUT_OVERHEAD, seed=self._config.seed)
        simulated = simulate(live, done.start_s + done.wall_s, measured, truth)
        both = [compare.figures(trace, done.start_s, end_s, self._slo) for trace in (live, simulated)]
        responses = accuracy.of_responses(live, done.start_s)
        predicted_ops = accuracy.of_ops(samples)
        responses["noise_floor"] = self._response_floor(live, done, measured, predicted_ops["noise_floor"])
        points = {"responses": responses.pop("pairs_ms"), **_points(samples)}
        lost = [f"{node_id} was lost" for node_id in live.lost_before(end_s)]
        return Measured(
            {
                "ops": predicted_ops,
                "responses": responses,
                "company": accuracy.by_company(samples),
                "client": done.client_figures(),
                "cpu_share": done.cpu_share,
            },
            {
                "workload": name,
                **compare.compare(*both),
                "live": both[0].to_json(),
                "simulated": both[1].to_json(),
                "delays_ms": {key: 1000.0 * value for key, value in measured._asdict().items()},
                "op_slip": compare.op_slip(live, done.start_s, end_s),
            },
            points,
            [f"{name}: {text}" for text in (*done.problems, *lost)],
        )

    def _response_floor(self, live: Trace, done: Done, measured: delays.Delays, op_floor: float | None) -> float | None:
        """Error of the same predictor in a simulated run whose operations differ from the scheduler's models by noise
        alone, as much as the engine's repetitions of one size do: what no model of operations can mend."""
        errors = []
        for seed in range(_FLOOR_SEEDS):
            truth = Truth(noise=(op_floor or 0.0) / _MEAN_DEVIATION, seed=seed)
            drawn = simulate(_without_interference(live), done.start_s + done.wall_s, measured, truth)
            error = accuracy.of_responses(drawn, done.start_s)["mape"]
            if error is not None:
                errors.append(error)
        return statistics.fmean(errors) if errors else None

    def _plan(self, name: str, latency: NodeLatency) -> tuple[list[PlannedRequest], SloTarget]:
        real = self._config.real
        rng = random.Random(f"{self._config.seed}/{name}")
        every = [Lengths(prompt, output) for prompt in real.prompt_lengths for output in real.output_lengths]
        rate = real.load * real.nodes * capacity_rps(latency, every, max_batch=real.max_batch)
        times = arrivals(rng, rate, real.seconds)
        requests = [request(f"{name}-{index}", at_s, rng.choice(every), rng) for index, at_s in enumerate(times)]
        rows = [TraceRow(0.0, item.prompt, item.output) for item in every]
        return requests, slo_of_units(self._config.slo_units, latency, rows)

    def _warmup(self) -> list[PlannedRequest]:
        real = self._config.real
        rng = random.Random(f"{self._config.seed}/warmup")
        lengths = [Lengths(prompt, real.output_lengths[0]) for prompt in real.prompt_lengths]
        return [
            request(f"warmup-{index}", 0.2 * index, lengths[index % len(lengths)], rng)
            for index in range(real.warmup_requests)
        ]

    def _backlog(self) -> Backlog:
        real = self._config.real
        rng = random.Random(f"{self._config.seed}/backlog")
        lengths = [real.training_lengths[index % len(real.training_lengths)] for index in range(_TRAINING_TEXTS)]
        return Backlog(texts=[letters(rng, length) for length in lengths])

    async def _start(self, stack: AsyncExitStack, name: str) -> Started:
        real = self._config.real
        slo = {"ttft_s": self._slo.ttft_s, "tpot_s": self._slo.tpot_s}
        return await started(
            stack,
            self._config,
            Cluster(
                name=f"real-{name}",
                model=self._model,
                nodes=real.nodes,
                stages=real.stages,
                core={"policy_options": {"forecast": "fast_forward"}, "default_slo": slo, "sync": "none"},
                node={"max_batch": real.max_batch},
                profiler={"grid": _grid(real)},
                profiles=self._profiles,
            ),
        )


def cached_model(cache: Path, *, hidden: int, layers: int, max_context_tokens: int) -> Path:
    """Directory of a model of random weights, made when it is not there."""
    path = cache / f"random-model-{hidden}-{layers}-{max_context_tokens}"
    if not path.is_dir():
        write_tiny_model(path, hidden=hidden, layers=layers, max_context_tokens=max_context_tokens)
    return path


def _without_interference(live: Trace) -> Trace:
    """The scheduler's models know none, so a simulated node without it is what they describe."""
    nodes = {
        node_id: replace(spec, latency=replace(spec.latency, interference=())) for node_id, spec in live.nodes.items()
    }
    return replace(live, nodes=nodes)


def _grid(real: RealConfig) -> dict[str, Any]:
    """The profiler's grid: sizes around those that occur, none of them equal."""
    longest = max(real.training_lengths)
    return {
        "max_point_tokens": real.max_context_tokens,
        "train": {"batches": [1, 2], "lengths": [16, 48, 128, 2 * longest]},
    }


def _points(samples: Sequence[ops.Sample]) -> dict[str, list[list[float]]]:
    """(measured, predicted) in milliseconds by kind of operation, every n-th of many."""
    found: dict[str, list[list[float]]] = {}
    for sample in samples:
        found.setdefault(sample.kind, []).append([1000.0 * sample.measured_s, 1000.0 * sample.online_s])
    return {kind: points[:: 1 + len(points) // _MOST_POINTS] for kind, points in found.items()}
