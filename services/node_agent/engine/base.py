"""What a node agent asks of an engine: stage workers that run one op at a time.

A stage worker owns one device, the parameters of its layers, the KV cache of its layers and the optimizer state of
its parameters. The node core decides the order; the worker never reorders. Large tensors (activations, gradients)
travel from worker to worker through handles, never through the agent.
"""

import asyncio
from dataclasses import dataclass
from typing import Protocol

from services.node_agent.engine.handle import Handle
from services.node_agent.engine.inference_ops import SampledToken
from services.node_agent.engine.ops import StageOp


@dataclass(frozen=True, slots=True)
class MeasuredMemory:
    """Bytes of a stage. peak: the most that its process (on a GPU: what it allocated there) took while an op was
    timed; resident: of the process afterwards; moved: by an op that moves. 0: not known."""

    resident_bytes: int
    peak_bytes: int = 0
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    moved_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StageResult:
    """What an op produced.

    Times are on the machine's monotonic clock, seconds; `version` is the stage's version after it.
    """

    op_id: int
    begin_s: float
    end_s: float
    version: int
    #: Output for the next stage (forward) or the previous one (backward). None at the ends. Optimizer step: stage 0's
    #: new embedding for the last stage, when they are tied. A handle can be read once.
    output: Handle | None = None
    #: Backward on the last stage: its part of the tied embedding's gradient, for stage 0's backward.
    tied_gradient: Handle | None = None
    #: Last stage, prefill and decode.
    tokens: tuple[SampledToken, ...] = ()
    #: Last stage, prefill: mean reference loss by request id.
    reference_losses: tuple[tuple[str, float], ...] = ()
    #: Last stage, (last piece of a) train forward: mean loss over the labels, unscaled, and their number.
    loss: float | None = None
    label_tokens: int = 0
    #: (Last piece of a) backward: squared norm of what its group has accumulated on this stage. Optimizer step: norm
    #: used for clipping.
    grad_norm_sq: float | None = None
    #: Snapshot: path of a safetensors file with this stage's parameters under full-model names.
    weights_path: str = ""
    #: With limited memory: bytes of KV blocks and saved activations on the device after it.
    held_bytes: int = 0
    #: Measure: durations per repetition by op kind.
    durations_s: tuple[tuple[str, tuple[float, ...]], ...] = ()
    #: Measure only.
    memory: MeasuredMemory | None = None
    #: Set when the op raised: "<ExceptionType>: message". The worker stays usable.
    error: str = ""


class StageWorker(Protocol):
    """One stage. `run` is called for one op at a time per stage."""

    @property
    def pid(self) -> int:
        """Process id that computes."""
        ...

    def run(self, op: StageOp) -> "asyncio.Future[StageResult]":
        """Start one op. The future ends with the op, also when that failed (`StageResult.error`); `WorkerDied` when the
        process is gone. Cancelling it gives up the result, not the op."""
        ...

    async def close(self) -> None:
        """Stop the worker; bounded by a few seconds, then it is killed."""
        ...


class WorkerDied(RuntimeError):
    """A stage worker's process ended; the message holds stage, exit code and the end of its stderr."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How to load a model and cut it into stages."""

    model_path: str
    num_stages: int = 1
    #: One device per stage, or one for all: "cpu", "cuda:0", ...
    devices: tuple[str, ...] = ("cpu",)
    dtype: str = "float32"
    #: Training computes its matrix products in this type ("bfloat16"), with weights, gradients and optimizer state in
    #: `dtype`, which is "float32" then. Empty: everything in `dtype`.
    training_dtype: str = ""
    #: Keep only what enters each layer between a micro-batch's forward and backward, and compute the rest again.
    activation_checkpointing: bool = False
    threads_per_stage: int = 1
    #: Added to the niceness of every worker process (0: unchanged).
    nice: int = 0
    #: CPU cores to pin the workers to, one per stage; empty: not pinned.
    cpus: tuple[int, ...] = ()
    kv_capacity_tokens: int = 65536
    #: Tokens of a block, the unit in which the KV cache is given out.
    kv_block_tokens: int = 64
    #: What ops keep may have to go to host memory.
    can_offload: bool = False
    max_context_tokens: int = 0
    seed: int = 0

    def device(self, stage: int) -> str:
        """Where a stage is."""
        return self.devices[stage] if len(self.devices) > 1 else self.devices[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What the engine found in the model directory."""

    architecture: str
    num_layers: int
    vocab_size: int
    max_context_tokens: int
    num_parameters: int
    eos_token_ids: tuple[int, ...]
    #: What a token takes on the stage where it takes most: in the KV cache, and for a backward (0: not measured).
    kv_bytes_per_token: int = 0
    activation_bytes_per_token: int = 0
    #: Devices of the stages with their names ("cpu AMD EPYC"), each once.
    device: str = ""
    #: Projections that LoRA can adapt, by the last part of their names; empty: the engine takes any name.
    projections: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ClockSlip:
    """How late the ends of emulated operations were noticed since the start, as shares of the operations' own times.

    p50, p99: at most an eighth too high. late_s, busy_s: lateness and time of all operations together, seconds.
    """

    ops: int = 0
    p50: float = 0.0
    p99: float = 0.0
    worst_s: float = 0.0
    late_s: float = 0.0
    busy_s: float = 0.0


class Engine(Protocol):
    """A loaded model: its stage workers in pipeline order."""

    @property
    def info(self) -> ModelInfo:
        """Facts about the model."""
        ...

    @property
    def workers(self) -> tuple[StageWorker, ...]:
        """Stage 0 first."""
        ...

    @property
    def clock_slip(self) -> ClockSlip | None:
        """How well an emulated engine keeps time; None: its operations are real."""
        ...

    async def close(self) -> None:
        """Stop every worker."""
        ...
