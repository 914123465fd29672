"""Events of the scheduler core.

Every time is in seconds on the scheduler's one monotonic clock; lengths are in tokens. The driver converts node clocks,
protobuf and wall time before an event reaches the core. All of it is immutable; what is made for every operation is a
named tuple, which takes a fifth of the time of a frozen dataclass.
"""

from dataclasses import dataclass
from typing import NamedTuple

from services.latency import NodeLatency, OpKind
from services.scheduler.core.node_spec import NodeSpec
from services.scheduler.core.tasks import Task


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
class JobEnded:
    """Everything of this job was trained."""

    job_id: str


@dataclass(frozen=True, slots=True)
class JobPaused:
    """Micro-batches of this job that no node holds leave, and no others are taken, until it is resumed or cancelled."""

    job_id: str


@dataclass(frozen=True, slots=True)
class JobResumed:
    """Micro-batches of this paused job are taken again."""

    job_id: str


@dataclass(frozen=True, slots=True)
class TrainingHeld:
    """The node takes no micro-batches, or does so again: it is about to go on from another node's checkpoint."""

    node_id: str
    held: bool


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
    #: Of an optimizer step: the job that made it.
    job_id: str = ""


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
class NodeProfiled:
    """A node was measured again; from now on it is predicted with this. One of another number of stages is ignored."""

    node_id: str
    latency: NodeLatency


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
    | JobEnded
    | JobPaused
    | JobResumed
    | TrainingHeld
    | OpFinished
    | TaskEnded
    | SnapshotReady
    | SyncEnded
    | SyncIntervalSet
    | WeightsTold
    | NodeProfiled
    | AdaptersTold
    | Tick
)
