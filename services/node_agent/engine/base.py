"""What a node agent asks of an engine: stage workers that run one op at a time.

A stage worker owns one device, the parameters of its layers, the KV cache of its layers and the optimizer state of
its parameters. The node core decides the order; the worker never reorders. Large tensors (activations, gradients)
travel from worker to worker through handles, never through the agent.

A prefill, decode, training forward or snapshot runs with the weights of the version it was stamped with, also on a
stage that is newer by now, as long as the stage keeps them; with any other version it is an error. Optimizer steps and
changes of weights are for the stage's current version.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class Handle:
    """Opaque name of a tensor another stage worker produced. `token` is for the transport alone."""

    token: object


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the last stage picks tokens. temperature 0: greedy; top_k 0: no limit.

    min_tokens: no end-of-sequence token among the first so many. logit_bias: (token id, what is added to its logit).
    logprobs: likeliest tokens to report with every token; None: nothing is reported.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class PrefillSequence:
    """A prompt to run. `reference_ids`: continuation whose loss is measured; it leaves no trace in the KV cache.

    The KV cache of the request `continues` ("": none), which has ended, becomes its own; as far as it holds the first
    `cached_tokens` of the prompt, they are not run. Without `continues` they were run by earlier ops (chunks).
    end_token: run the prompt up to here; 0: to its end, which yields the first new token.
    output_tokens: so many of the last tokens are the request's own output, computed before it gave up its cache.
    adapter_id: isolated adapter that serves the request from its first to its last token; empty: the model itself.
    """

    request_id: str
    token_ids: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    reference_ids: tuple[int, ...] = ()
    cached_tokens: int = 0
    continues: str = ""
    end_token: int = 0
    output_tokens: int = 0
    adapter_id: str = ""


class DecodeSequence(NamedTuple):
    """One running request; its newest token is at `position` (0-based). A tuple because it pickles twice as fast."""

    request_id: str
    token_id: int
    position: int


@dataclass(frozen=True, slots=True)
class Example:
    """One training example; labels are tokens at index >= max(1, num_context_tokens)."""

    token_ids: tuple[int, ...]
    num_context_tokens: int = 0


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """AdamW and its schedule (by its name in transformers: constant, constant_with_warmup, linear, cosine)."""

    learning_rate: float = 1e-4
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    total_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """LoRA of a training job, in the terms of peft's LoraConfig.

    adapter_id: the job's id. target_modules: projections by the last part of their names, or "all-linear"; empty: what
    peft takes for the model. isolated: it serves requests that name it, on the model's own weights; otherwise it is
    part of the served model, like the other adapters that are not isolated.
    """

    adapter_id: str
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    isolated: bool = False

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> "AdapterSpec":
        """From `dataclasses.asdict` by way of JSON."""
        return cls(**{**stored, "target_modules": tuple(stored["target_modules"])})


@dataclass(frozen=True, slots=True)
class Prefill:
    """Run prompts, or pieces of them, and one token for each of `decodes`. `hidden` is None on stage 0."""

    op_id: int
    version: int
    sequences: tuple[PrefillSequence, ...]
    hidden: Handle | None = None
    decodes: tuple[DecodeSequence, ...] = ()


@dataclass(frozen=True, slots=True)
class Decode:
    """One token for each request."""

    op_id: int
    version: int
    sequences: tuple[DecodeSequence, ...]
    hidden: Handle | None = None


@dataclass(frozen=True, slots=True)
class TrainForward:
    """Forward of a micro-batch, or one of the `parts` pieces it is cut into; keeps what its backward needs.

    Pieces run in order and each repeats the examples. The first takes `hidden`, the last returns the output, and on the
    last stage the loss of the whole micro-batch. `loss_scale` multiplies the loss before backward (1 / accumulation).
    optimizer: of the job; memory for its state is taken now, so that its step cannot lack it. None: at the step.
    adapter: what the job trains, named by the job's id; None: all weights.
    """

    op_id: int
    version: int
    task_id: str
    examples: tuple[Example, ...]
    loss_scale: float = 1.0
    hidden: Handle | None = None
    part: int = 0
    parts: int = 1
    job_id: str = ""
    optimizer: OptimizerSpec | None = None
    adapter: AdapterSpec | None = None


@dataclass(frozen=True, slots=True)
class TrainBackward:
    """Backward of a micro-batch, or a piece of it, in as many as its forward; `gradient` is None on the last stage.

    group: gradients accumulate per group, until the group's optimizer step.
    tied_gradient: for stage 0 of a model with tied embeddings cut into several stages, what the last stage returned in
    `StageResult.tied_gradient` for this micro-batch; stage 0 owns the embedding. The first piece takes both, the last
    returns the output.
    """

    op_id: int
    task_id: str
    gradient: Handle | None = None
    tied_gradient: Handle | None = None
    group: int = 0
    part: int = 0


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """Apply a group's accumulated gradients; the stage's version rises by one, also when the result has an error.

    grad_norm_sq_total: squared norm of the group's whole gradient, the sum of what the stages' last backwards reported;
    clipping uses it so that S stages clip like one. None: this stage's own norm. When it is not finite every stage
    drops its gradient, keeps its weights and reports an error.
    tied_weight: for the last stage of a model with tied embeddings cut into several stages, stage 0's `output` of this
    step.
    oldest_version: no op on its way to this stage needs older weights; those from this version on are kept, the others
    dropped. None: no such op needs any but the new ones.
    """

    op_id: int
    version: int
    job_id: str
    optimizer: OptimizerSpec
    grad_norm_sq_total: float | None = None
    tied_weight: Handle | None = None
    group: int = 0
    oldest_version: int | None = None


#: Between the id of a round of synchronisation and the part of the weights that a snapshot holds.
PART_SEPARATOR = "#"


def round_of(sync_id: str) -> str:
    """The round that a snapshot is of."""
    return sync_id.partition(PART_SEPARATOR)[0]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Copy this stage's weights of `version`, or of an adapter alone, aside under a name; peers read them through
    `StageResult.weights`. An adapter that is not there is made."""

    op_id: int
    version: int
    sync_id: str
    adapter: AdapterSpec | None = None


@dataclass(frozen=True, slots=True)
class LoadWeights:
    """Change this stage's weights; the version rises by one, also when the result has an error (weights unchanged).

    path: safetensors file with full-model parameter names. mode "replace": take them over. mode "average": the file
    holds the mean of all snapshots; weights += mean - own snapshot of `sync_id`, so that steps made meanwhile are kept.
    oldest_version: as for OptimizerStep. adapter: its weights alone are changed; it is made if it is not there.
    """

    op_id: int
    version: int
    sync_id: str
    path: str
    mode: str
    oldest_version: int | None = None
    adapter: AdapterSpec | None = None


@dataclass(frozen=True, slots=True)
class SaveCheckpoint:
    """Write this stage's weights, adapters, optimizer states, schedules and random state into `folder`, which exists;
    the names are those of `checkpoint_files`. Weights that are as in the model directory are left out. Only for the
    stage's current version: optimizer states of older ones are not kept.
    """

    op_id: int
    version: int
    folder: str
    #: Those that all stages have.
    adapters: tuple[AdapterSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class RestoreCheckpoint:
    """Take over what a checkpoint holds, whatever number of stages wrote it; the version rises by one, also when the
    result has an error (nothing changed). oldest_version: as for OptimizerStep.
    """

    op_id: int
    version: int
    folder: str
    oldest_version: int | None = None


@dataclass(frozen=True, slots=True)
class Forget:
    """Free a request's KV cache, a micro-batch's saved activations and, by job id, a job's optimizer state.

    Runs between ops; unknown ids are ignored. Outputs of these tasks that nobody read yet are released. adapter_ids:
    jobs whose adapter goes as well; no request that it serves is left.
    """

    op_id: int
    task_ids: tuple[str, ...]
    adapter_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Offload:
    """Move the KV caches of requests, and the saved activations of micro-batches, to host memory. Unknown ids are
    ignored: a task that has just ended may have left."""

    op_id: int
    task_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reload:
    """Move them back; nothing runs with what is in host memory."""

    op_id: int
    task_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Measure:
    """Time one op on this stage with made-up data; weights, KV cache and optimizer state are left as they were.

    kind: an `OpKind` value; train_forward returns forward and backward durations.
    """

    op_id: int
    kind: str
    batch: int
    length: int
    repetitions: int
    warmup: int


StageOp = (
    Prefill
    | Decode
    | TrainForward
    | TrainBackward
    | OptimizerStep
    | Snapshot
    | LoadWeights
    | SaveCheckpoint
    | RestoreCheckpoint
    | Forget
    | Offload
    | Reload
    | Measure
)

#: Ops after which a stage's version is one higher, whatever became of them.
VersionedChange = OptimizerStep | LoadWeights | RestoreCheckpoint


class Logprobs(NamedTuple):
    """Log-probabilities in the place of a token, nats, by the model's own distribution: before temperature, penalties
    and bias. `top`: the likeliest tokens with theirs, likeliest first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class SampledToken(NamedTuple):
    """A new token of a request. `is_end`: it is an end-of-sequence token and the request did not ignore it."""

    request_id: str
    token_id: int
    is_end: bool = False
    #: None: not asked for.
    logprobs: Logprobs | None = None


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
    #: Resident memory of the worker, bytes (Measure only).
    resident_bytes: int = 0
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
    #: Projections that LoRA can adapt, by the last part of their names; empty: the engine takes any name.
    projections: tuple[str, ...] = ()


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

    async def close(self) -> None:
        """Stop every worker."""
        ...
