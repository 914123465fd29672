"""Emulated stage workers.

They keep the books of a real worker (versions, KV cache, saved activations, accumulated gradients) and fail an op that
breaks them, so that whoever drives them wrongly finds out without a model. Results are simple functions anyone can
compute: see `next_token` and `EmulatedWorker`.
"""

import asyncio
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

from services.node_agent.engine.base import EngineConfig, ModelInfo, StageResult
from services.node_agent.engine.emulated.timing import EmulatedTiming
from services.node_agent.engine.emulated.worker import EmulatedStage
from services.node_agent.engine.ops import StageOp
from services.runtime.clock import Clock, SystemClock

#: Sees every result before the agent does and may change it, or raise WorkerDied. For tests of failures.
Tamper = Callable[[int, StageOp, StageResult], StageResult]
Sleep = Callable[[float], Awaitable[None]]

_DEFAULT_CONTEXT_TOKENS = 4096


class EmulatedWorker:
    """One stage: takes the op's time, then does its bookkeeping. Implements `StageWorker`."""

    def __init__(
        self, stage: EmulatedStage, timing: EmulatedTiming, clock: Clock, sleep: Sleep, tamper: Tamper | None
    ) -> None:
        self._stage = stage
        self._timing = timing
        self._clock = clock
        self._sleep = sleep
        self._tamper = tamper
        self._running: asyncio.Task[StageResult] | None = None
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
        self._running = asyncio.ensure_future(self._run(op))
        return self._running

    async def _run(self, op: StageOp) -> StageResult:
        begin_s = self._clock.monotonic_s()
        duration_s = self._timing.op_s(op, self._stage.train_shapes)
        if duration_s > 0:
            await self._sleep(duration_s)
        else:
            await asyncio.sleep(0)  # a real worker never answers in the same turn of the loop
        result = self._stage.perform(op, begin_s, self._clock.monotonic_s())
        return result if self._tamper is None else self._tamper(self._stage.index, op, result)

    async def close(self) -> None:
        """Nothing to stop."""
        self.closed = True


class EmulatedEngine:
    """A pipeline of emulated workers. Implements `Engine`."""

    def __init__(self, info: ModelInfo, workers: tuple[EmulatedWorker, ...], directory: Path) -> None:
        self._info = info
        self._workers = workers
        self._directory = directory

    @property
    def info(self) -> ModelInfo:
        """Facts from config.json."""
        return self._info

    @property
    def workers(self) -> tuple[EmulatedWorker, ...]:
        """Stage 0 first."""
        return self._workers

    async def close(self) -> None:
        """Close the workers and remove the snapshots."""
        for worker in self._workers:
            await worker.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def load_emulated_engine(
    config: EngineConfig,
    timing: EmulatedTiming | None = None,
    *,
    clock: Clock | None = None,
    sleep: Sleep = asyncio.sleep,
    tamper: Tamper | None = None,
) -> EmulatedEngine:
    """An emulated replica of the model whose config.json lies in `model_path`.

    Raises ValueError naming the file when it is missing or unusable.
    """
    info = _read_info(Path(config.model_path), config.max_context_tokens)
    # Made when the first snapshot is written.
    directory = Path(tempfile.gettempdir()) / f"lemix-emulated-{uuid.uuid4().hex}"
    timing = timing or EmulatedTiming()
    workers = tuple(
        EmulatedWorker(
            EmulatedStage(index, config.num_stages, info, config.kv_capacity_tokens, directory, timing),
            timing,
            clock or SystemClock(),
            sleep,
            tamper,
        )
        for index in range(config.num_stages)
    )
    return EmulatedEngine(info, workers, directory)


def emulated_fingerprint(config: EngineConfig, timing: EmulatedTiming) -> str:
    """Digest of what the durations depend on: the latency models and the number of stages."""
    models = {kind.value: (model.form, model.coefficients) for kind, model in timing.models.items()}
    parts = json.dumps(["emulated", config.num_stages, models], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _read_info(model_path: Path, max_context_tokens: int) -> ModelInfo:
    path = model_path / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        eos = content.get("eos_token_id")
        context = int(content.get("max_position_embeddings", _DEFAULT_CONTEXT_TOKENS))
        return ModelInfo(
            architecture=(content.get("architectures") or ["Emulated"])[0],
            num_layers=int(content.get("num_hidden_layers", 1)),
            vocab_size=int(content["vocab_size"]),
            max_context_tokens=min(context, max_context_tokens) if max_context_tokens else context,
            num_parameters=0,
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a model configuration: {type(error).__name__}: {error}") from error
