"""Loads a model into stage workers: processes in production, in this process for unit tests."""

import asyncio
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from services.node_agent.engine.base import ClockSlip, EngineConfig, ModelInfo, StageResult, StageWorker
from services.node_agent.engine.ops import StageOp
from services.node_agent.engine.torch.arena import create_arena
from services.node_agent.engine.torch.device_sharing import share_device_memory
from services.node_agent.engine.torch.load import ModelSpec, check_engine_config, read_model
from services.node_agent.engine.torch.process import ProcessStageWorker
from services.node_agent.engine.torch.wire import Ready, WorkerSetup
from services.node_agent.scratch import ScratchFolder

if TYPE_CHECKING:
    from services.node_agent.engine.torch.executor import StageExecutor

_LOG = logging.getLogger(__name__)
START_TIMEOUT_S = 300.0
#: Raised when the engine computes the same with other kernels: profiles measured before do not hold any more.
_KERNELS = 2


class TorchEngine:
    """See Engine. Owns the workers and the folder of their snapshots."""

    def __init__(self, info: ModelInfo, workers: Sequence[StageWorker], folder: ScratchFolder) -> None:
        self._info = info
        self._workers = tuple(workers)
        self._folder = folder

    @property
    def info(self) -> ModelInfo:
        """See Engine."""
        return self._info

    @property
    def workers(self) -> tuple[StageWorker, ...]:
        """See Engine."""
        return self._workers

    @property
    def clock_slip(self) -> ClockSlip | None:
        """See Engine."""
        return None

    async def close(self) -> None:
        """See Engine."""
        try:
            await asyncio.gather(*(worker.close() for worker in self._workers))
        finally:
            self._folder.remove()


async def load_engine(config: EngineConfig, *, start_timeout_s: float = START_TIMEOUT_S) -> TorchEngine:
    """Start one worker process per stage, all at once.

    Raises ModelDirectoryError or ValueError (bad model or configuration), WorkerDied (a worker ended while it
    started), TimeoutError after `start_timeout_s`. Nothing is left running then.
    """
    spec = read_model(config.model_path)
    check_engine_config(config, spec)
    folder = ScratchFolder("engine")
    arena_fds = [create_arena() for _ in range(config.num_stages)]
    setups = [
        WorkerSetup(config, spec, stage, arena_fds, folder.path / f"stage-{stage}")
        for stage in range(config.num_stages)
    ]
    starts = [asyncio.create_task(ProcessStageWorker.start(setup, arena_fds)) for setup in setups]
    try:
        async with asyncio.timeout(start_timeout_s):
            workers = await asyncio.gather(*starts)
            await _choose_transport(config, workers)
    except BaseException:
        await _abandon(starts)
        folder.remove()
        raise
    finally:
        for fd in arena_fds:
            os.close(fd)
    return TorchEngine(_info(config, spec, [worker.ready for worker in workers]), workers, folder)


async def _choose_transport(config: EngineConfig, workers: Sequence[ProcessStageWorker]) -> None:
    if config.num_stages == 1:
        return
    where, problem = "host memory", ""
    if all(config.device(stage).startswith("cuda") for stage in range(config.num_stages)):
        problem = await share_device_memory(workers)
        where = "host memory" if problem else "device memory (CUDA IPC)"
    _LOG.info("outputs go from stage to stage through %s%s", where, f": {problem}" if problem else "")


def _info(config: EngineConfig, spec: ModelSpec, stages: Sequence[Ready]) -> ModelInfo:
    return replace(
        spec.info(config.max_context_tokens),
        kv_bytes_per_token=max(stage.kv_bytes_per_token for stage in stages),
        activation_bytes_per_token=max(stage.activation_bytes_per_token for stage in stages),
        device=_device_names(config.devices),
    )


class InProcessStageWorker:
    """A StageWorker that computes in the caller's process and thread."""

    def __init__(self, executor: "StageExecutor") -> None:
        self.executor = executor

    @property
    def pid(self) -> int:
        """See StageWorker."""
        return os.getpid()

    def run(self, op: StageOp) -> "asyncio.Future[StageResult]":
        """See StageWorker."""
        answer: asyncio.Future[StageResult] = asyncio.get_running_loop().create_future()
        answer.set_result(self.executor.run(op))
        return answer

    async def close(self) -> None:
        """See StageWorker."""
        self.executor.close()


def load_inprocess_engine(config: EngineConfig) -> TorchEngine:
    """All stages in this process. Thread counts, niceness and pinning are the caller's. Raises as load_engine."""
    from services.node_agent.engine.torch.executor import StageExecutor
    from services.node_agent.engine.torch.transport import LocalTransport

    spec = read_model(config.model_path)
    check_engine_config(config, spec)
    folder = ScratchFolder("engine")
    try:
        executors = [
            StageExecutor(config, spec, stage, LocalTransport(), folder.path / f"stage-{stage}")
            for stage in range(config.num_stages)
        ]
    except BaseException:
        folder.remove()
        raise
    workers = [InProcessStageWorker(executor) for executor in executors]
    return TorchEngine(_info(config, spec, [executor.ready for executor in executors]), workers, folder)


def profile_fingerprint(config: EngineConfig, info: ModelInfo) -> str:
    """Digest of what op durations depend on: model shape, stages, devices, dtype, threads, processor, kernels."""
    spec: ModelSpec = read_model(config.model_path)
    shape = {key: value for key, value in spec.config.items() if isinstance(value, int | float) or value is None}
    parts = {
        "architecture": info.architecture,
        "num_parameters": info.num_parameters,
        "shape": shape,
        "num_stages": config.num_stages,
        "devices": config.devices,
        "dtype": config.dtype,
        "training": (config.training_dtype, config.activation_checkpointing),
        "threads_per_stage": config.threads_per_stage,
        "processor": _processor_name(),
        "kernels": (importlib.metadata.version("torch"), _KERNELS),
        "gpus": _gpu_names() if any(device.startswith("cuda") for device in config.devices) else [],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


async def _abandon(starts: Sequence["asyncio.Task[ProcessStageWorker]"]) -> None:
    """Stop workers that started and those still starting."""
    for start in starts:
        # Not twice: that would interrupt the cleaning up.
        if not start.cancelling():
            start.cancel()
    for outcome in await asyncio.gather(*starts, return_exceptions=True):
        if isinstance(outcome, ProcessStageWorker):
            await outcome.close()


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _device_names(devices: Sequence[str]) -> str:
    kinds = sorted({device.partition(":")[0] for device in devices})
    names = {"cpu": _processor_name(), "cuda": ", ".join(sorted(set(_gpu_names())))}
    return "; ".join(f"{kind} {names.get(kind, '')}".strip() for kind in kinds)


def _gpu_names() -> list[str]:
    """Models of the NVIDIA GPUs, as the driver lists them."""
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
