"""Events, commands and configuration of the node core.

Times are seconds on the node's monotonic clock, lengths tokens. All of it is immutable; what is made for every op is a
named tuple, which takes a fifth of the time of a frozen dataclass.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from services.latency import OpKind

#: How training uses the pipeline, see `NodeCoreConfig.training_schedule`.
ASYNC, GPIPE, ONE_F_ONE_B = SCHEDULES = ("async", "gpipe", "1f1b")
#: Promises by which requests without one are queued when the scheduler has none either, seconds.
DEFAULT_TTFT_S, DEFAULT_TPOT_S = 1.0, 0.1


class QueueOrder(StrEnum):
    """Order in which a stage takes the ops that are ready on it.

    fifo: by the time the op became ready, serving and training alike (what naive mixing does).
    inference_first: inference before training, by deadline; training fills what is left.
    """

    FIFO = "fifo"
    INFERENCE_FIRST = "inference_first"


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """A request as the core sees it.

    deadline_s: when its first token is due (arrival + TTFT promise). tpot_s: time promised per further token.
    None: the node's default promise is used for ordering, so that no request can wait for ever.
    """

    task_id: str
    arrival_s: float
    prompt_tokens: int
    max_tokens: int
    deadline_s: float | None = None
    #: Extra tokens computed during prefill only (the reference continuation whose loss is measured).
    reference_tokens: int = 0
    tpot_s: float | None = None
    #: Conversation it is the next turn of: its prompt begins with the turns before it. Empty: none.
    session_id: str = ""
    #: Request of which it is a further choice: the same prompt, which both compute together where they can. Empty: of
    #: none.
    choice_of: str = ""

    @property
    def group(self) -> str:
        """Names the choices of one prompt."""
        return self.choice_of or self.task_id


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
    #: No further micro-batch of this job comes to this node: its optimizer step need not wait for a full group.
    last: bool = False
    #: Pieces its forward and its backward are cut into on every stage, so that inference can run in between.
    parts: int = 1


class Op(NamedTuple):
    """One operation that travels over the stages: upwards for forwards and steps, downwards for backwards.

    `version` is the weights step it was stamped with when it entered its first stage: every stage runs it with
    exactly those weights. An op with `changes_weights` (optimizer step, applied synchronisation) starts at `version`
    and leaves the stage at `version` + 1. With "stash" a stage may be newer than the op: it keeps the older weights
    from `oldest_version` on. A backward carries the version of its forward.
    """

    op_id: int
    kind: OpKind
    task_ids: tuple[str, ...]
    version: int
    #: New tokens computed, padding not counted; of a mixed op those of prompts.
    num_tokens: int = 0
    #: Context tokens in the batch: of a decode all of them, of a prefill those of its prompts that were there before.
    context_tokens: int = 0
    #: Names the synchronisation for WEIGHT_SYNC, the job for training ops.
    subject: str = ""
    #: Sequences in the op: requests (of a mixed op: prompts), or examples of the micro-batch.
    batch: int = 0
    #: The stage's version rises by one when this op ends on it, also when it failed there.
    changes_weights: bool = False
    #: Of an op that changes weights: no op on its way needs weights older than this; `version` + 1: nor the ones it
    #: changes.
    oldest_version: int = 0
    #: Accumulation group of a training op; its gradients are kept apart from those of others.
    group: int = 0
    #: Which piece of a training forward or backward this is, from 0, and of how many.
    part: int = 0
    parts: int = 1
    #: What OFFLOAD and RELOAD move; they run on one stage and name the tasks whose data they move.
    num_bytes: int = 0
    #: Of a prefill with kept prefixes, per task: how many leading tokens of its prompt need not be computed, and the
    #: ended request whose KV cache has them and is the task's own from now on ("": none).
    cached_tokens: tuple[int, ...] = ()
    continued: tuple[str, ...] = ()
    #: Of a prefill with choices, per task: the one in this op whose prompt it has, and whose keys and values it gets a
    #: copy of when they are there ("": none). Nothing is computed for it, and it does not count in `batch`.
    shares: tuple[str, ...] = ()
    #: Of a prefill in pieces, per prompt: up to where it is computed (() : all to their ends), from `cached_tokens` on.
    end_tokens: tuple[int, ...] = ()
    #: Of a mixed op, a prefill that decodes too: its task ids end with `partials` prompts that are not at their ends
    #: yet and `decodes` decoding requests of so many context tokens.
    partials: int = 0
    decodes: int = 0
    decode_context_tokens: int = 0

    @property
    def first_ids(self) -> tuple[str, ...]:
        """Of a prefill: the requests that get their first token."""
        return self.task_ids[: len(self.task_ids) - self.partials - self.decodes]

    @property
    def partial_ids(self) -> tuple[str, ...]:
        """Of a prefill: the requests whose prompt goes on in another one."""
        end = len(self.task_ids) - self.decodes
        return self.task_ids[end - self.partials : end]

    @property
    def decode_ids(self) -> tuple[str, ...]:
        """Of a prefill: the requests that decode in it."""
        return self.task_ids[len(self.task_ids) - self.decodes :]


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
    settles: training begun before it ends before it, groups that are not full included: no gradient of the weights
    before may be applied to those after.
    """

    sync_id: str
    changes_weights: bool
    settles: bool = False


class OpDone(NamedTuple):
    """A stage finished an op. `stopped` holds the requests that produced their end-of-sequence token.

    failed: the op raised; its tasks end with an error and the op does not travel further. An op that changes weights
    travels on all the same: its failed part was skipped and the version rises on every stage, so that stages agree.
    """

    stage: int
    op_id: int
    stopped: tuple[str, ...] = ()
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; nothing else happened. Due at the core's `next_wakeup_s`."""


Event = RequestArrived | MicrobatchArrived | Cancelled | SyncRequested | OpDone | Tick

# --------------------------------------------------------------------------- commands


class RunOp(NamedTuple):
    """Run this op on this stage now; the stage is idle."""

    stage: int
    op: Op


@dataclass(frozen=True, slots=True)
class FreeKv:
    """Free the KV cache of a request (and any saved activations of a micro-batch) on every stage.

    Sent when it left, or, when its KV cache was kept for its session, as soon as that is over without a next turn.
    """

    task_id: str


@dataclass(frozen=True, slots=True)
class TaskDone:
    """A task ended; sent exactly once per task.

    reason: "stop", "length", "cancelled", "error" or "trained". detail: why, in numbers, when the core itself refused
    the task (it can never fit the KV cache); empty when an op failed.
    """

    task_id: str
    reason: str
    detail: str = ""


Command = RunOp | FreeKv | TaskDone


@dataclass(frozen=True, slots=True)
class MemoryCounters:
    """Memory of a node's stages: what is held now, stage 0 first, and what has happened since the start.

    waits: ops that had to wait for room, for waited_s seconds together. failures: ops refused because they did not fit.
    """

    used_bytes: tuple[int, ...]
    host_bytes: tuple[int, ...]
    waits: int = 0
    waited_s: float = 0.0
    offloads: int = 0
    offloaded_bytes: int = 0
    reloads: int = 0
    reloaded_bytes: int = 0
    failures: int = 0


@dataclass(frozen=True, slots=True)
class NodeSnapshot:
    """What a node is doing, for heartbeats. Per-stage tuples start with stage 0."""

    waiting_requests: int
    running_requests: int
    #: Training tasks not started, between forward and backward, and waiting for their optimizer step.
    waiting_microbatches: int
    inflight_microbatches: int
    accumulated_microbatches: int
    pending_syncs: int
    kv_used_tokens: int
    kv_capacity_tokens: int
    #: Of sessions between two turns; makes room whenever a request needs it.
    kv_kept_tokens: int
    #: Times that a request gave up its blocks, since the start.
    preemptions: int
    versions: tuple[int, ...]
    #: Ops ready on a stage and not started.
    queue_lengths: tuple[int, ...]
    #: Op running on a stage.
    running_ops: tuple[Op | None, ...]
    #: None: memory is not accounted for (`NodeCoreConfig.memory`).
    memory: MemoryCounters | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """Memory of a stage for KV caches and saved activations, and what they take; the same on every stage.

    An op runs when what its stage holds and what it adds are at most kappa * peak_bytes. Otherwise it waits for room,
    at most max_wait_s; then data of other tasks goes to host memory. wait_or_offload False: it fails at once.
    A micro-batch's forward, which nobody waits for and which adds most, has max_forward_wait_s.
    Raises ValueError naming the field when a value makes no sense.
    """

    #: M_peak: what a stage has beside its weights, gradients and optimizer state.
    peak_bytes: int
    kv_bytes_per_token: int
    #: Kept from a micro-batch's forward until its backward.
    activation_bytes_per_token: int
    kappa: float = 0.9
    #: T_max.
    max_wait_s: float = 0.05
    #: T_max of training forwards. Short, they push out what others need back at once, and stages only move data.
    max_forward_wait_s: float = 5.0
    wait_or_offload: bool = True

    def __post_init__(self) -> None:
        for name in ("peak_bytes", "kv_bytes_per_token", "activation_bytes_per_token"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 < self.kappa <= 1.0:
            raise ValueError(f"kappa must be above 0 and at most 1, got {self.kappa}")
        for name in ("max_wait_s", "max_forward_wait_s"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def budget_bytes(self) -> int:
        """Most that a stage may hold."""
        return int(self.kappa * self.peak_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCoreConfig:
    """Bounds of one node. Raises ValueError naming the field when a value makes no sense."""

    num_stages: int
    queue_order: QueueOrder = QueueOrder.INFERENCE_FIRST
    #: Most requests decoded together. At most num_stages * max_batch requests run at once.
    max_batch: int = 16
    #: Most new tokens of one prefill op (a longer prompt runs alone).
    max_prefill_tokens: int = 2048
    #: Most new tokens of one inference op, references apart: one for every decoding request, then prompts, in pieces
    #: where they do not fit. 0: prompts are computed whole, and apart from decodes.
    max_batch_tokens: int = 0
    #: Tokens the KV cache holds; a request is admitted when prompt + max_tokens fit.
    kv_capacity_tokens: int = 1 << 30
    #: Tokens of a block of the KV cache; what a request or a session holds is rounded up to whole blocks.
    kv_block_tokens: int = 1
    #: "async": A-PP. "gpipe", "1f1b": S-PP, an accumulation group is a mini-batch and none of the next one's forwards
    #: runs on a stage before this one's step. gpipe: no backward before all forwards of the group left the last stage.
    #: 1f1b: a stage has run at most (num_stages - stage) forwards more than backwards, and then takes turns.
    training_schedule: str = "async"
    #: Output that a request is admitted for, tokens. Who needs more gets more blocks; when none is left, the request
    #: admitted last gives its own up and is computed again, prompt and output so far. 0: max_tokens, so nobody is.
    expected_output_tokens: int = 0
    #: A request that was computed again so often is admitted for max_tokens and keeps its blocks.
    max_preemptions: int = 2
    #: Tokens of KV cache kept for sessions between their turns, as far as running requests leave room. 0: none.
    prefix_cache_tokens: int = 0
    #: Kept KV serves until the weights have changed this often, counted in epochs: version // epoch_steps.
    epoch_steps: int = 64
    #: Micro-batches whose forward ran and whose backward has not (A-PP window; S-PP has its own bound).
    max_inflight_training: int = 2
    #: "drain": finish in-flight backwards before the weights change. "stash": change them at once; a stage keeps the
    #: older weights for what is on its way with them. So nothing waits for a step, and a micro-batch's gradient is
    #: applied late (PipeDream-like delay). Costs one copy of the weights per version on its way.
    weight_handling: str = "drain"
    #: "stash": accumulation groups whose gradients a stage may hold at once, one copy of the weights each. With 1 a
    #: stage waits with the next group's backward until the step has come up from stage 0; one per stage never waits.
    gradient_buffers: int = 1
    #: inference_first: a stage with a training op ready gives training a turn at least this often.
    max_training_wait_s: float = 1.0
    #: An accumulation group that got no new micro-batch for this long takes its step with what it has.
    group_timeout_s: float = 1.0
    #: Requests that may overtake one that does not fit the KV cache yet; then it is next.
    max_bypass: int = 8
    #: inference_first: requests past their first-token deadline let those pass that can still keep theirs, this long.
    max_demotion_s: float = 10.0
    #: Promises used for ordering when a request has none.
    default_ttft_s: float = DEFAULT_TTFT_S
    default_tpot_s: float = DEFAULT_TPOT_S
    #: None: memory is not looked at beyond `kv_capacity_tokens`.
    memory: MemoryConfig | None = None

    def __post_init__(self) -> None:
        for name in (
            "num_stages",
            "max_batch",
            "max_prefill_tokens",
            "kv_capacity_tokens",
            "kv_block_tokens",
            "epoch_steps",
            "max_inflight_training",
            "gradient_buffers",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_batch_tokens and self.max_batch_tokens <= self.max_batch:
            raise ValueError(
                f"max_batch_tokens must be 0 or more than max_batch ({self.max_batch}), got {self.max_batch_tokens}"
            )
        for name in (
            "prefix_cache_tokens",
            "max_batch_tokens",
            "expected_output_tokens",
            "max_preemptions",
            "max_training_wait_s",
            "group_timeout_s",
            "max_bypass",
            "max_demotion_s",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("default_ttft_s", "default_tpot_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        self._check_memory()
        if self.weight_handling not in ("drain", "stash"):
            raise ValueError(f'weight_handling must be "drain" or "stash", got {self.weight_handling!r}')
        if self.training_schedule not in SCHEDULES:
            raise ValueError(f"training_schedule must be one of {', '.join(SCHEDULES)}, got {self.training_schedule!r}")

    def ordered(self, order: QueueOrder, ttft_s: float | None = None, tpot_s: float | None = None) -> "NodeCoreConfig":
        """With the queue order and the default promises (seconds; None: the node's own) that a scheduler wants."""
        return replace(
            self,
            queue_order=order,
            default_ttft_s=ttft_s or DEFAULT_TTFT_S,
            default_tpot_s=tpot_s or DEFAULT_TPOT_S,
        )

    def _check_memory(self) -> None:
        if self.kv_block_tokens > self.kv_capacity_tokens:
            raise ValueError(
                f"kv_block_tokens must be at most kv_capacity_tokens, got {self.kv_block_tokens} and "
                f"{self.kv_capacity_tokens}"
            )
