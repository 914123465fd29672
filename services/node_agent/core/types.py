"""Events and commands of the node core. Times are seconds on the node's monotonic clock, lengths tokens."""

from dataclasses import dataclass
from enum import StrEnum

from services.latency import OpKind


class QueueOrder(StrEnum):
    """Order in which a stage takes the ops that are ready on it.

    fifo: by the time the op became ready, serving and training alike (what naive mixing does).
    inference_first: inference before training, by deadline; training fills what is left.
    """

    FIFO = "fifo"
    INFERENCE_FIRST = "inference_first"


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """A request as the core sees it. `deadline_s` is when its first token is due (arrival + TTFT promise)."""

    task_id: str
    arrival_s: float
    prompt_tokens: int
    max_tokens: int
    deadline_s: float | None = None
    #: Extra tokens computed during prefill only (the reference continuation whose loss is measured).
    reference_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TrainingMicrobatch:
    """A micro-batch as the core sees it: `batch` examples padded to `length` tokens."""

    task_id: str
    arrival_s: float
    job_id: str
    sequence: int
    batch: int
    length: int
    #: Micro-batches per optimizer step of its job.
    accumulation: int = 1


@dataclass(frozen=True, slots=True)
class Op:
    """One operation that travels over the stages: upwards for forwards and steps, downwards for backwards.

    `version` is the weights step it was stamped with when it entered its first stage: every stage runs it at
    exactly that version.
    """

    op_id: int
    kind: OpKind
    task_ids: tuple[str, ...]
    version: int
    #: New tokens computed, padding not counted.
    num_tokens: int = 0
    #: Context tokens in the batch (decode).
    context_tokens: int = 0
    #: Names the synchronisation for WEIGHT_SYNC, the job for OPTIMIZER_STEP.
    subject: str = ""


# --------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """The node took a request from its queue."""

    request: InferenceRequest


@dataclass(frozen=True, slots=True)
class MicrobatchArrived:
    """The node took a micro-batch from its queue."""

    microbatch: TrainingMicrobatch


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Drop this task and free what it holds."""

    task_id: str


@dataclass(frozen=True, slots=True)
class SyncRequested:
    """Run a weight operation at the next version boundary.

    changes_weights False: a snapshot (runs between ops, keeps the version); True: apply (raises the version).
    """

    sync_id: str
    changes_weights: bool


@dataclass(frozen=True, slots=True)
class OpDone:
    """A stage finished an op. `stopped` holds the requests that produced their end-of-sequence token.

    failed: the op raised; its tasks end with an error and the op does not travel further.
    """

    stage: int
    op_id: int
    stopped: tuple[str, ...] = ()
    failed: bool = False


Event = RequestArrived | MicrobatchArrived | Cancelled | SyncRequested | OpDone

# --------------------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class RunOp:
    """Run this op on this stage now; the stage is idle."""

    stage: int
    op: Op


@dataclass(frozen=True, slots=True)
class FreeKv:
    """A request left: free its KV cache (and any saved activations of a micro-batch) on every stage."""

    task_id: str


@dataclass(frozen=True, slots=True)
class TaskDone:
    """A task ended. reason: "stop", "length", "cancelled", "error" or "trained"."""

    task_id: str
    reason: str


Command = RunOp | FreeKv | TaskDone


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCoreConfig:
    """Bounds of one node."""

    num_stages: int
    queue_order: QueueOrder = QueueOrder.INFERENCE_FIRST
    #: Most requests decoded together.
    max_batch: int = 16
    #: Most new tokens of one prefill op (a longer prompt runs alone).
    max_prefill_tokens: int = 2048
    #: Tokens the KV cache holds; a request is admitted when prompt + max_tokens fit.
    kv_capacity_tokens: int = 1 << 30
    #: Micro-batches whose forward ran and whose backward has not (A-PP window).
    max_inflight_training: int = 2
    #: "drain": finish in-flight backwards before an optimizer step. "stash": step at once; in-flight micro-batches
    #: keep the weights they ran with, so their gradient is applied late (PipeDream-like delay).
    weight_handling: str = "drain"
