"""Emulated stage workers.

They keep the books of a real worker (versions, KV cache, saved activations, accumulated gradients, offloaded data) and
fail an op that breaks them, so that whoever drives them wrongly finds out without a model. Results are simple functions
anyone can compute: see `next_token` and `EmulatedStage`.

Time is that of the emulated device. An op begins when the one before it on the stage has ended, or, later, when what it
waited for has: another stage's op at its end on the device, anything else when it comes. So what the agent needs to
notice an end and to start the next op does not add up; how late ends are noticed is counted as clock slip.
"""

import asyncio
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import structlog

from services.latency import NodeLatency, OpKind
from services.model_shape import ModelShape
from services.node_agent.engine.base import ClockSlip, EngineConfig, ModelInfo, StageResult
from services.node_agent.engine.emulated.clock_slip import SlipCounter
from services.node_agent.engine.emulated.device_timer import Timer, device_timer
from services.node_agent.engine.emulated.durations import StageDurations
from services.node_agent.engine.emulated.timing import EmulatedTiming, kind_of
from services.node_agent.engine.emulated.worker import EmulatedStage
from services.node_agent.engine.ops import Offload, Reload, StageOp
from services.node_agent.engine.training_ops import TrainBackward
from services.runtime.clock import Clock, SystemClock

_log = structlog.get_logger()

#: Sees every result before the agent does and may change it, or raise WorkerDied. For tests of failures.
Tamper = Callable[[int, StageOp, StageResult], StageResult]

_DEFAULT_CONTEXT_TOKENS = 4096


class EmulatedDevice:
    """What the stages of a node share: clock, timer, what they run, and the moment that an op's end stands for."""

    def __init__(self, clock: Clock, timer: Callable[[], Timer]) -> None:
        self.clock = clock
        self.slip = SlipCounter()
        #: By stage: the kind of op that runs there.
        self.running: dict[int, OpKind] = {}
        #: While the agent is told of an op's end: when that was. Whatever it starts then could have begun at that time.
        self.cause_s: float | None = None
        self._make_timer = timer
        self._timer: Timer | None = None

    @property
    def timer(self) -> Timer:
        """Made when it is first needed, in the event loop."""
        if self._timer is None:
            self._timer = self._make_timer()
        return self._timer

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.close()


class EmulatedWorker:
    """One stage: takes the op's time, then does its bookkeeping. Implements `StageWorker`."""

    def __init__(
        self, stage: EmulatedStage, durations: StageDurations, device: EmulatedDevice, tamper: Tamper | None
    ) -> None:
        self._stage = stage
        self._durations = durations
        self._device = device
        self._tamper = tamper
        self._running: asyncio.Future[StageResult] | None = None
        #: When the stage's newest op ended, or will.
        self._free_s = 0.0
        self.closed = False

    @property
    def pid(self) -> int:
        """This process: nothing is spawned."""
        return os.getpid()

    @property
    def stage(self) -> EmulatedStage:
        """The books, for tests."""
        return self._stage

    def run(self, op: StageOp) -> "asyncio.Future[StageResult]":
        """Start one op. Raises RuntimeError when another one has not ended yet."""
        if self._running is not None and not self._running.done():
            raise RuntimeError(f"stage {self._stage.index} got {type(op).__name__} while another op is running")
        device, stage, loop = self._device, self._stage, asyncio.get_running_loop()
        cause_s = device.cause_s if device.cause_s is not None else device.clock.monotonic_s()
        begin_s = max(self._free_s, cause_s)
        kind = kind_of(op)
        duration_s = self._durations.op_s(
            op,
            shape=stage.train_shapes.get(op.task_id, (0, 0, 1)) if isinstance(op, TrainBackward) else (0, 0, 1),
            num_bytes=stage.bytes_to_move(op) if isinstance(op, Offload | Reload) else 0,
            busy=[other for index, other in device.running.items() if index != stage.index],
        )
        end_s = self._free_s = begin_s + duration_s
        self._running = future = loop.create_future()
        future.add_done_callback(lambda ended: None if ended.cancelled() else self._enter(end_s))
        if duration_s > 0.0:
            if kind is not None:
                device.running[stage.index] = kind
            device.timer.call_at(end_s, lambda: self._end(future, op, begin_s, end_s))
        else:
            # A real worker never answers in the same turn of the loop.
            loop.call_soon(self._end, future, op, begin_s, end_s)
        return future

    def _end(self, future: "asyncio.Future[StageResult]", op: StageOp, begin_s: float, end_s: float) -> None:
        device = self._device
        device.running.pop(self._stage.index, None)
        if future.done() or self.closed:
            return
        if kind_of(op) is not None and end_s > begin_s:
            device.slip.observe(max(0.0, device.clock.monotonic_s() - end_s), end_s - begin_s)
        try:
            result = self._stage.perform(op, begin_s, end_s)
            if self._tamper is not None:
                result = self._tamper(self._stage.index, op, result)
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(result)
        # Runs when those who wait for the result have: they were put into the loop's queue just before.
        asyncio.get_running_loop().call_soon(self._leave)

    def _enter(self, end_s: float) -> None:
        self._device.cause_s = end_s

    def _leave(self) -> None:
        self._device.cause_s = None

    async def close(self) -> None:
        """Nothing to stop."""
        self.closed = True


class EmulatedEngine:
    """A pipeline of emulated workers. Implements `Engine`."""

    def __init__(
        self, info: ModelInfo, workers: tuple[EmulatedWorker, ...], device: EmulatedDevice, directory: Path
    ) -> None:
        self._info = info
        self._workers = workers
        self._device = device
        self._directory = directory

    @property
    def info(self) -> ModelInfo:
        """Facts from config.json."""
        return self._info

    @property
    def workers(self) -> tuple[EmulatedWorker, ...]:
        """Stage 0 first."""
        return self._workers

    @property
    def clock_slip(self) -> ClockSlip:
        """How late ends were noticed."""
        return self._device.slip.figures()

    async def close(self) -> None:
        """Close the workers, tell the clock slip and remove the snapshots."""
        for worker in self._workers:
            await worker.close()
        self._device.close()
        _log.info("clock slip", **asdict(self.clock_slip))
        shutil.rmtree(self._directory, ignore_errors=True)


def load_emulated_engine(
    config: EngineConfig,
    timing: EmulatedTiming | None = None,
    *,
    noise_seed: str | None = None,
    clock: Clock | None = None,
    timer: Callable[[], Timer] = device_timer,
    tamper: Tamper | None = None,
) -> EmulatedEngine:
    """An emulated replica of the model whose config.json lies in `model_path`.

    noise_seed: durations spread as the profile says; None: they are as predicted. Raises ValueError naming the file
    when it is missing or unusable.
    """
    info = _read_info(Path(config.model_path), config)
    # Made when the first snapshot is written.
    directory = Path(tempfile.gettempdir()) / f"lemix-emulated-{uuid.uuid4().hex}"
    timing = timing or EmulatedTiming(NodeLatency(({},) * config.num_stages))
    device = EmulatedDevice(clock or SystemClock(), timer)
    workers = []
    for index in range(config.num_stages):
        durations = StageDurations(timing, index, noise_seed)
        stage = EmulatedStage(index, config, info, directory, durations)
        workers.append(EmulatedWorker(stage, durations, device, tamper))
    return EmulatedEngine(info, tuple(workers), device, directory)


def emulated_fingerprint(config: EngineConfig, timing: EmulatedTiming) -> str:
    """Digest of what the durations depend on: the latency models, the scale and the number of stages."""
    parts = json.dumps(["emulated", config.num_stages, timing.time_scale, _described(timing.latency)], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _described(latency: NodeLatency) -> Any:
    models = [{kind.value: repr(models[kind]) for kind in models} for models in latency.models]
    return [models, repr(latency.interference), repr(latency.host_links), repr(latency.mixed)]


def _read_info(model_path: Path, config: EngineConfig) -> ModelInfo:
    path = model_path / "config.json"
    limit = config.max_context_tokens
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        eos = content.get("eos_token_id")
        context = int(content.get("max_position_embeddings", _DEFAULT_CONTEXT_TOKENS))
        shape = ModelShape.from_config(content) if config.can_offload or "hidden_size" in content else None
        layers = shape.layers_of(0, config.num_stages) if shape is not None else 0
        return ModelInfo(
            architecture=(content.get("architectures") or ["Emulated"])[0],
            num_layers=int(content.get("num_hidden_layers", 1)),
            vocab_size=int(content["vocab_size"]),
            max_context_tokens=min(context, limit) if limit else context,
            num_parameters=0,
            device="emulated",
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
            kv_bytes_per_token=shape.kv_bytes_per_token(layers) if shape is not None else 0,
            activation_bytes_per_token=shape.activation_bytes_per_token(layers) if shape is not None else 0,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a model configuration: {type(error).__name__}: {error}") from error
