"""Events and commands of the scheduler core, and the plain data they carry.

Every time is in seconds on the scheduler's one monotonic clock; lengths are in tokens. The driver converts node
clocks, protobuf and wall time before an event reaches the core. All of it is immutable; what is made for every
operation or candidate is a named tuple, which takes a fifth of the time of a frozen dataclass.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from services.latency import NodeLatency, OpKind

# --------------------------------------------------------------------------- tasks


@dataclass(frozen=True, slots=True)
class SloTarget:
    """Response-time promise; None: that part is not checked."""

    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class InferenceTask:
    """A request to serve. `max_tokens` bounds the output, whose real length nobody knows yet."""

    task_id: str
    arrival_s: float
    prompt_tokens: int
    max_tokens: int
    slo: SloTarget = SloTarget()
    session_id: str = ""
    #: Most seconds since the newest optimizer step in the weights that serve it; None: any weights will do.
    max_staleness_s: float | None = None
    #: Isolated adapter that serves it; only nodes that hold it can. Empty: the model itself.
    adapter_id: str = ""


@dataclass(frozen=True, slots=True)
class TrainingTask:
    """One micro-batch of a job: `batch` examples padded to `length` tokens."""

    task_id: str
    arrival_s: float
    job_id: str
    batch: int
    length: int
    #: Micro-batches per optimizer step of its job.
    accumulation: int = 1


Task = InferenceTask | TrainingTask


class NodeRole(StrEnum):
    """What a policy lets a node do."""

    SERVE = "serve"
    TRAIN = "train"
    BOTH = "both"
    #: Gets no work.
    UNUSED = "unused"


class QueueOrder(StrEnum):
    """Order of a node's stage queues; see `services.node_agent.core`."""

    FIFO = "fifo"
    INFERENCE_FIRST = "inference_first"


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """What a node told when it joined."""

    node_id: str
    num_stages: int
    latency: NodeLatency
    max_inflight_inference: int = 64
    #: Most requests it decodes together.
    max_batch: int = 16
    max_context_tokens: int = 1 << 30
    kv_capacity_tokens: int = 1 << 30
    #: Most pieces its runtime can cut a training operation into; 1: it cannot.
    max_training_parts: int = 1
    #: "async" (A-PP), or one accumulation group of a job at a time (S-PP): "gpipe", "1f1b".
    training_schedule: str = "async"
    #: Tokens of KV cache it keeps for sessions between their turns; 0: it keeps none.
    prefix_cache_tokens: int = 0
    #: What it keeps serves within an epoch of its weights: step // epoch_steps.
    epoch_steps: int = 64
    #: Most new tokens of one prefill; micro-batches between forward and backward; what its weights do at a step, and
    #: groups whose gradients a stage holds. See `services.node_agent.core.types.NodeCoreConfig`.
    max_prefill_tokens: int = 2048
    max_inflight_training: int = 2
    weight_handling: str = "drain"
    gradient_buffers: int = 1
    #: Of its process; 0: not told.
    incarnation: int = 0
    #: When the newest optimizer step that its weights contain was made; None: they were never trained.
    trained_s: float | None = None
    #: Most new tokens of an inference op that may cut prompts into pieces and decode; 0: prompts are computed whole.
    max_batch_tokens: int = 0
    kv_block_tokens: int = 1

    @property
    def synchronous_training(self) -> bool:
        """Whether it trains a group at a time: the scheduler's bound on micro-batches in flight is not for it."""
        return self.training_schedule != "async"


# --------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class NodeJoined:
    """A node may get work from now on."""

    node: NodeSpec


@dataclass(frozen=True, slots=True)
class NodeLost:
    """A node is gone; its unfinished work is assigned again.

    keeps_training: not its micro-batches: they wait outside of the core for the node to come back from a checkpoint,
    and are recovered or arrive anew.
    """

    node_id: str
    reason: str = ""
    keeps_training: bool = False


@dataclass(frozen=True, slots=True)
class NodeDraining:
    """A node is about to leave: it finishes what it holds and gets nothing new, until it joins again."""

    node_id: str


@dataclass(frozen=True, slots=True)
class TaskArrived:
    """Accepted work, durable in the ledger."""

    task: Task


@dataclass(frozen=True, slots=True)
class TaskRecovered:
    """After a restart of the scheduler: the ledger says that this node holds the task, unfinished.

    Nothing is assigned again. Is the node not known (not joined yet), the task waits like a new one.
    """

    task: Task
    node_id: str


@dataclass(frozen=True, slots=True)
class TaskCancelled:
    """Nobody wants this task any more."""

    task_id: str


@dataclass(frozen=True, slots=True)
class JobCancelled:
    """All micro-batches of this job are unwanted."""

    job_id: str


@dataclass(frozen=True, slots=True)
class JobPaused:
    """Micro-batches of this job that no node holds leave, and no others are taken, until it is resumed or cancelled."""

    job_id: str


@dataclass(frozen=True, slots=True)
class JobResumed:
    """Micro-batches of this paused job are taken again."""

    job_id: str


class OpFinished(NamedTuple):
    """A real trace: one operation ended on a stage. Corrects the forecast."""

    node_id: str
    stage: int
    op: OpKind
    begin_s: float
    end_s: float
    task_ids: tuple[str, ...] = ()
    num_tokens: int = 0
    #: Of a decode iteration all tokens before the new ones; of a prefill those found in kept prefixes.
    context_tokens: int = 0
    first_token: bool = False
    weight_step: int = 0
    #: Which piece of a training forward or backward this was, from 0, and of how many.
    part: int = 0
    parts: int = 1
    #: Of a prefill: the task ids end with `partials` whose prompt is not at its end yet, and `decodes` that decode in
    #: it, with so many context tokens.
    partials: int = 0
    decodes: int = 0
    decode_context_tokens: int = 0
    #: Of an optimizer step: it was one of an isolated adapter, no part of the served model.
    isolated: bool = False


@dataclass(frozen=True, slots=True)
class TaskEnded:
    """The node reported the end of a task. `ok` is False for failed or cancelled work."""

    task_id: str
    node_id: str
    ok: bool
    output_tokens: int = 0
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class SnapshotReady:
    """Phase one of a synchronisation is done on a node."""

    sync_id: str
    node_id: str


@dataclass(frozen=True, slots=True)
class SyncEnded:
    """Phase two is done on a node, or the synchronisation failed there."""

    sync_id: str
    node_id: str
    ok: bool
    weight_step: int = 0


@dataclass(frozen=True, slots=True)
class SyncIntervalSet:
    """From now on replicas are synchronised every `steps` optimizer steps of a node; 0: never.

    Overrides `CoreConfig.sync_every_steps`; sent when the interval is derived from the newest job.
    """

    steps: int


@dataclass(frozen=True, slots=True)
class WeightsTold:
    """What a node says of its weights. trained_s: when the newest optimizer step they contain was made, wherever that
    was; None: never."""

    node_id: str
    weight_step: int
    trained_s: float | None


@dataclass(frozen=True, slots=True)
class AdaptersTold:
    """The isolated adapters that a node holds now."""

    node_id: str
    adapter_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; nothing else happened. The driver sends one at the core's `next_wakeup_s`."""


Event = (
    NodeJoined
    | NodeLost
    | NodeDraining
    | TaskArrived
    | TaskRecovered
    | TaskCancelled
    | JobCancelled
    | JobPaused
    | JobResumed
    | OpFinished
    | TaskEnded
    | SnapshotReady
    | SyncEnded
    | SyncIntervalSet
    | WeightsTold
    | AdaptersTold
    | Tick
)

# --------------------------------------------------------------------------- commands


class NodeTerms(NamedTuple):
    """Terms behind a decision for one candidate node, kept for `explain`.

    idleness_s: II, response_s: R, idleness_profit: IP, length_consistency: LC, score: what the policy compared (the
    largest wins). A term the policy does not look at is 0. `docs/scheduler.md` tells what R and score are per policy.
    cached_tokens: tokens of the prompt that the policy expects the node to keep of the session's turns before.
    """

    node_id: str
    idleness_s: float
    response_s: float
    idleness_profit: float
    length_consistency: float
    score: float
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Assign:
    """Move a task to a node's queue."""

    task_id: str
    node_id: str
    terms: tuple[NodeTerms, ...] = ()
    #: Pieces a micro-batch's forward and backward are to be cut into on every stage, so that requests get in between.
    parts: int = 1
    #: A request's place in the node's queue is that of one promised its first token so long after its arrival. None: as
    #: it was promised.
    queue_ttft_s: float | None = None


@dataclass(frozen=True, slots=True)
class Defer:
    """The task waits (no node, in-flight bound, or held back); it stays accepted. Sent once per reason."""

    task_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Reject:
    """The task will not run. `code` is a name of `lemix.errors.ErrorCode`."""

    task_id: str
    code: str
    message: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class CancelOnNode:
    """Tell a node to drop a task."""

    task_id: str
    node_id: str


@dataclass(frozen=True, slots=True)
class Drop:
    """A cancelled task that no node holds is to be closed in the ledger."""

    task_id: str


@dataclass(frozen=True, slots=True)
class TakeBack:
    """A micro-batch of a paused job that no node holds is to be forgotten; it is offered again when the job goes on."""

    task_id: str


class SyncMode(StrEnum):
    """How a synchronisation changes weights."""

    REPLACE = "replace"
    AVERAGE = "average"


class SyncChoice(StrEnum):
    """How replicas are kept together: as the policy does it, not at all, by averaging, by copying from one trainer."""

    POLICY = "policy"
    NONE = "none"
    AVERAGE = "average"
    CHECKPOINT = "checkpoint"


@dataclass(frozen=True, slots=True)
class TakeSnapshot:
    """Phase one: the node copies its weights so that peers may fetch them."""

    sync_id: str
    node_id: str


@dataclass(frozen=True, slots=True)
class ApplyWeights:
    """Phase two: the node fetches the sources' snapshots and changes its weights."""

    sync_id: str
    node_id: str
    mode: SyncMode
    source_node_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WarnBehind:
    """The node lacks what others trained and is used all the same: so many rounds in a row could not bring it up to
    date."""

    node_id: str
    num_failed: int


Command = Assign | Defer | Reject | CancelOnNode | Drop | TakeBack | TakeSnapshot | ApplyWeights | WarnBehind

# --------------------------------------------------------------------------- configuration


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreConfig:
    """Knobs of the core. Raises ValueError naming the field when a value makes no sense.

    Units are in the names; see `docs/scheduler.md` for the trade-offs.
    """

    policy: str = "lemix"
    #: Options of the policy by name (for example lambda_1, lambda_2, tau_s); an unknown name is a ValueError.
    policy_options: dict[str, float | int | str | bool] = field(default_factory=dict)
    default_slo: SloTarget = SloTarget()
    #: Response-time unit of the paper: mean forward time per stage * stages. 0: derived from the profile.
    slo_unit_s: float = 0.0
    #: Most inference requests without a node; more are rejected with OVERLOADED.
    max_waiting_inference: int = 4096
    #: Most micro-batches offered to the core at once (the job's backlog stays in the ledger).
    max_waiting_training: int = 64
    #: A-PP window: micro-batches per node whose backward is not over. Those that wait for the optimizer step of their
    #: accumulation group do not count, or a group larger than the window could never fill.
    max_inflight_training: int = 4
    #: Longest time training may be held back while inference keeps arriving, seconds (starvation bound).
    max_hold_back_s: float = 5.0
    #: Sessions remembered with the node of their newest turn; the one used longest ago is forgotten first.
    max_sessions: int = 16384
    #: Output length assumed until enough requests of the cluster have ended, tokens.
    initial_output_tokens: int = 64
    #: Seconds without activity after which a node no longer counts as held.
    hold_s: float = 10.0
    #: What is done every `sync_every_steps` optimizer steps of a node (0: never).
    sync: SyncChoice = SyncChoice.POLICY
    sync_every_steps: int = 0
    #: Give up on a synchronisation after this long, seconds.
    sync_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name in (
            "max_waiting_inference",
            "max_waiting_training",
            "max_inflight_training",
            "max_sessions",
            "initial_output_tokens",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("slo_unit_s", "max_hold_back_s", "hold_s", "sync_every_steps", "sync_timeout_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
