"""What the client takes and gives: plain, frozen, no protobuf."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypedDict

from lemix.errors import LemixError

__all__ = [
    "Checkpoint",
    "CheckpointPolicy",
    "Choice",
    "ClusterStatus",
    "ExportedCheckpoint",
    "FeedbackReceipt",
    "FinishReason",
    "Generation",
    "GenerationChunk",
    "GenerationOptions",
    "Hyperparameters",
    "JobEvent",
    "JobStatus",
    "Lora",
    "Message",
    "Model",
    "NodeStatus",
    "OpPrediction",
    "OutputLogprob",
    "PredictionError",
    "QualityGate",
    "ServingReport",
    "Slo",
    "TokenLogprob",
    "TrainingFile",
    "TrainingJob",
    "TrainingMethod",
    "TrainingMode",
    "Usage",
    "WeightVersion",
]


class FinishReason(Enum):
    """Why generation ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class JobStatus(Enum):
    """State of a training job."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    PAUSED = "paused"

    @property
    def ended(self) -> bool:
        """Whether nothing more will run unless the job is resumed by hand."""
        return self not in (JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.PAUSED)


class TrainingMethod(Enum):
    """Which parameters a job changes: all of the model, or those of a low-rank adapter."""

    FULL = "full"
    LORA = "lora"


class TrainingMode(Enum):
    """Whom the result serves: everybody, or requests that name the job's own model."""

    ONLINE = "online"
    ISOLATED = "isolated"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. role: "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Response-time promise, seconds; None: no promise. tpot: mean time per output token after the first."""

    ttft_s: float | None = None
    tpot_s: float | None = None


class GenerationOptions(TypedDict, total=False):
    """Keyword arguments of the generating calls, all optional.

    model: empty, the served model itself; or that of an isolated job (`TrainingJob.served_model`). max_tokens:
    default 16, for a conversation what fits. temperature: in [0, 2], 0 is greedy; default 1. top_p: in (0, 1];
    default 1. top_k: default no limit. seed: default drawn by the server. stop: strings that end the output, at
    most 4. include_stop_str_in_output: show the one that did. ignore_eos: generate past the end of sequence.
    min_tokens: the output does not end before. presence_penalty, frequency_penalty: in [-2, 2]. logit_bias: added
    to the logit of a token id. logprobs: report log-probabilities, with so many likeliest tokens per place, 0 to
    20. n: outputs wanted, 1 to 128. slo: default the cluster's. session_id: the conversation. request_id: repeating
    one returns the stored result; default a new one. reference: the true continuation, whose loss is measured and
    reported. max_staleness_s: most seconds since the newest optimizer step in the serving weights.
    """

    model: str
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int | None
    seed: int | None
    stop: str | Sequence[str]
    include_stop_str_in_output: bool
    ignore_eos: bool
    min_tokens: int
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    logprobs: int | None
    n: int
    slo: Slo | None
    session_id: str
    request_id: str
    reference: str | None
    max_staleness_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightVersion:
    """Identity of weights: the node's replica, its loading, the changes since, the job of the newest step."""

    node_id: str
    incarnation: int
    step: int
    job_id: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its text and its log-probability, nats, before temperature, penalties and bias."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True, slots=True)
class OutputLogprob:
    """What is reported of one output token. top: the likeliest tokens in its place, likeliest first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingReport:
    """What was measured. staleness_s: age of the weights. reference_loss: nats per token of the given reference."""

    node_id: str
    weight_versions: tuple[WeightVersion, ...]
    staleness_s: float | None = None
    reference_loss: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One whole output. logprobs: one per token, if asked for."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    report: ServingReport
    logprobs: tuple[OutputLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation(Choice):
    """A whole output. usage: of all choices, the prompt counted once. more_choices: those after the first, which is
    this object itself."""

    request_id: str
    model: str
    usage: Usage
    more_choices: tuple[Choice, ...] = ()

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All outputs."""
        return (self, *self.more_choices)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationChunk:
    """New output of one choice. finish_reason and report come with the choice's last chunk, usage with the very last.

    logprobs: one per token, if asked for.
    """

    request_id: str
    model: str
    text: str
    token_ids: tuple[int, ...]
    choice_index: int = 0
    logprobs: tuple[OutputLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    report: ServingReport | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFile:
    """A stored training file. num_skipped: lines left out. num_truncated: examples cut to the model's context."""

    file_id: str
    size_bytes: int
    num_examples: int
    created_unix_s: float
    num_skipped: int = 0
    num_truncated: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """How a job trains; None takes the server's default.

    learning_rate: peak of AdamW. num_epochs: passes over the file. batch_size: examples per micro-batch.
    gradient_accumulation_steps: micro-batches per optimizer step. lr_schedule: "constant", "constant_with_warmup",
    "linear" or "cosine". warmup_steps: optimizer steps. max_grad_norm: larger gradients are scaled down.
    max_skipped_in_row: micro-batches in a row whose loss or gradient is not finite, after which the job fails.
    """

    learning_rate: float | None = None
    num_epochs: int | None = None
    batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    lr_schedule: str | None = None
    warmup_steps: int | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    max_skipped_in_row: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPolicy:
    """When the nodes that train a job save checkpoints; None leaves it to the node.

    every_steps: optimizer steps of a node between two. every_s: longest time that a step is in no checkpoint, seconds.
    """

    every_steps: int | None = None
    every_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityGate:
    """What is done with the loss on a job's held-out examples; None takes the server's default.

    tolerance: a checkpoint is bad when its loss is above the best by more, nats per token. max_bad_evaluations: after
    so many in a row the node goes back to the best; 0: never. publish: every new best one to the other nodes.
    """

    tolerance: float | None = None
    max_bad_evaluations: int | None = None
    publish: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint on a node. trained_microbatches: those it contains, by job. reason: why it was saved.

    heldout_loss: nats per token on held-out examples, None when it was not measured.
    """

    checkpoint_id: str
    node_id: str
    created_unix_s: float
    size_bytes: int
    trained_microbatches: Mapping[str, int]
    reason: str
    heldout_loss: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedCheckpoint:
    """A Hugging Face directory that a node wrote; path: on that node."""

    node_id: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A low-rank adapter in the terms of peft's LoraConfig; None and empty take the server's defaults.

    target_modules: projections by the last part of their names, or "all-linear" alone.
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    target_modules: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """A training job. last_loss: nats per token of the newest micro-batch. error: why it failed.

    unsaved_microbatches: of the trained ones, those that no checkpoint contains yet. heldout_loss: newest loss on the
    examples of validation_file, nats per token; best_heldout_loss is that of best_checkpoint_id.
    skipped_microbatches: those whose loss or gradient was not finite.
    served_model: what requests name to be served by an isolated job; empty: nothing (any more).
    """

    job_id: str
    model: str
    training_file: str
    status: JobStatus
    created_unix_s: float
    finished_unix_s: float | None
    hyperparameters: Hyperparameters
    num_examples: int
    total_microbatches: int
    trained_microbatches: int
    trained_tokens: int
    last_loss: float | None
    steps_per_node: Mapping[str, int] = field(default_factory=dict)
    error: LemixError | None = None
    unsaved_microbatches: int = 0
    validation_file: str = ""
    heldout_loss: float | None = None
    best_heldout_loss: float | None = None
    best_checkpoint_id: str = ""
    skipped_microbatches: int = 0
    method: TrainingMethod = TrainingMethod.FULL
    mode: TrainingMode = TrainingMode.ONLINE
    lora: Lora | None = None
    served_model: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    """Something that happened to a job, and the job after it. sequence: from 1, without gaps."""

    sequence: int
    created_unix_s: float
    level: str
    message: str
    loss: float | None
    trained_microbatches: int
    job: TrainingJob


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackReceipt:
    """Where an example went: the job that trains it and its place there, from 1."""

    job_id: str
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A served model. max_context_tokens: prompt plus output. parent: the model it is an adapter of, if it is one."""

    model_id: str
    max_context_tokens: int
    created_unix_s: float
    parent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpPrediction:
    """How well operations of one kind on one stage are predicted.

    error, error_beside: running mean of |predicted - real| / real while the node only served or only trained, and while
    it did both (None: it did not). ratio: predicted now, after what was learnt, over profiled. interval: 90 % of the
    durations lie between these multiples of the prediction. drifting: the operations are off their profile.
    """

    stage: int
    op: str
    count: int
    error: float | None
    error_beside: float | None
    ratio: float
    interval: tuple[float, float]
    drifting: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionError:
    """How well requests are predicted when they are assigned: running mean of |predicted - real| / real.

    predicted: "ttft" (arrival to first token) or "response" (arrival to last token). beside_training: of requests on
    nodes that trained as well.
    """

    predicted: str
    beside_training: bool
    count: int
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """One node agent. role: "serve", "train", "both" or "unused"."""

    node_id: str
    ready: bool
    num_stages: int
    inflight_inference: int
    inflight_training: int
    weight_step: int
    role: str
    ops: tuple[OpPrediction, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """The cluster now. not_ready_reason: empty when ready."""

    policy: str
    ready: bool
    not_ready_reason: str
    nodes: tuple[NodeStatus, ...]
    waiting_inference: int
    waiting_training: int
    predictions: tuple[PredictionError, ...] = ()
