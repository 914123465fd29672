"""What a simulation is made of and what it tells."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from services.latency import NodeLatency, OpKind
from services.node_agent.core.types import MemoryCounters, NodeCoreConfig
from services.scheduler.core.commands import NodeTerms
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.tasks import SloTarget

NO_PROMISE = SloTarget()


@dataclass(frozen=True, slots=True)
class Request:
    """An inference request. `output_tokens` is its real length, at most `max_tokens`. The cores do not know it,
    unless it is fixed: then it is `max_tokens`.

    after: it arrives `think_s` after the end of that request, and not before `arrival_s`. When that one ends badly, it
    never arrives and counts as cancelled.
    """

    task_id: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    slo: SloTarget = NO_PROMISE
    session_id: str = ""
    after: str = ""
    think_s: float = 0.0
    fixed_output: bool = False


@dataclass(frozen=True, slots=True)
class Microbatch:
    """A training task: `batch` examples padded to `length` tokens, one optimizer step after `accumulation` of them."""

    task_id: str
    arrival_s: float
    job_id: str
    batch: int
    length: int
    accumulation: int = 1


Work = Request | Microbatch


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualNode:
    """A node of the simulated cluster.

    latency: how long its operations really take. believed: what the scheduler was told (a profile with its error);
    None: the truth. Times are simulation seconds; `lost_s` must be after `joins_s`. host_link_bytes_per_s: between the
    memory of a stage and that of its host, one way at a time (`core.memory`); infinite: as `latency` says, if it does.
    """

    node_id: str
    latency: NodeLatency
    core: NodeCoreConfig
    believed: NodeLatency | None = None
    max_inflight_inference: int = 64
    max_context_tokens: int = 1 << 30
    max_training_parts: int = 1
    host_link_bytes_per_s: float = math.inf
    joins_s: float = 0.0
    lost_s: float = math.inf

    def __post_init__(self) -> None:
        if not self.host_link_bytes_per_s > 0.0:
            raise ValueError(f"host_link_bytes_per_s must be positive, got {self.host_link_bytes_per_s}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """How a simulation runs.

    noise: relative standard deviation of operation durations; None: each as its latency model says. cut_overhead: share
    that cutting a training operation into pieces adds to it. dispatch_s: from a decision until the node has the task.
    handover_s: from the moment a stage could begin an operation until it begins. report_s: from the end of an operation
    until the scheduler knows. outcome_s: from the end of a task; what its node had to report before comes along; None:
    `report_s`. transfer_s: a replica's weights from one node to another. horizon_s: stop then,
    whatever is unfinished. keep_ops: keep every operation (costs memory).
    """

    core: CoreConfig
    seed: int = 0
    noise: float | None = 0.0
    cut_overhead: float = 0.05
    dispatch_s: float = 0.0
    handover_s: float = 0.0
    report_s: float = 0.0
    outcome_s: float | None = None
    transfer_s: float = 0.0
    horizon_s: float = math.inf
    keep_ops: bool = False

    def __post_init__(self) -> None:
        if self.noise is not None and not self.noise >= 0.0:
            raise ValueError(f"noise must not be negative, got {self.noise}")
        if self.outcome_s is not None and not self.outcome_s >= 0.0:
            raise ValueError(f"outcome_s must not be negative, got {self.outcome_s}")
        for name in ("cut_overhead", "dispatch_s", "handover_s", "report_s", "transfer_s", "horizon_s"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(slots=True, eq=False)
class TaskRecord:
    """What became of one task. Times in simulation seconds, None: never."""

    work: Work
    node_id: str = ""
    assigned_s: float | None = None
    first_token_s: float | None = None
    ended_s: float | None = None
    #: A reason of the node core ("stop", "length", "trained", ...), "rejected", or empty while unfinished.
    outcome: str = ""
    #: How often a node took it: more than once after the loss of a node.
    assignments: int = 0
    #: Prompt tokens of a request whose KV cache its node had kept.
    cached_tokens: int = 0

    @property
    def ok(self) -> bool:
        """Whether it ended as it should."""
        return self.outcome in ("stop", "length", "trained")

    @property
    def response_s(self) -> float:
        """From arrival to end; infinite when it did not end well."""
        return self.ended_s - self.work.arrival_s if self.ok and self.ended_s is not None else math.inf


@dataclass(slots=True, eq=False)
class Stay:
    """A task on a node, from its assignment until it left: by its end or because the node was lost."""

    node_id: str
    task_id: str
    begin_s: float
    end_s: float = math.inf


@dataclass(frozen=True, slots=True)
class OpRecord:
    """One operation on one stage. subject: the job of a training operation, the round and phase of a weight sync."""

    node_id: str
    stage: int
    kind: OpKind
    begin_s: float
    end_s: float
    task_ids: tuple[str, ...]
    subject: str = ""


@dataclass(slots=True, eq=False)
class StageUse:
    """Busy time of one stage by kind of operation, seconds, and the span it was used in."""

    busy_s: dict[OpKind, float] = field(default_factory=dict)
    first_begin_s: float | None = None
    last_end_s: float | None = None

    def add(self, kind: OpKind, begin_s: float, end_s: float) -> None:
        """An operation ran."""
        self.busy_s[kind] = self.busy_s.get(kind, 0.0) + (end_s - begin_s)
        if self.first_begin_s is None:
            self.first_begin_s = begin_s
        self.last_end_s = end_s


@dataclass(slots=True, eq=False)
class Decision:
    """An assignment with the terms behind it."""

    at_s: float
    task_id: str
    node_id: str
    terms: tuple[NodeTerms, ...]


@dataclass(slots=True, eq=False)
class SimulationResult:
    """Everything a run left behind."""

    tasks: dict[str, TaskRecord]
    stages: dict[tuple[str, int], StageUse]
    decisions: list[Decision]
    #: Every stay of a task on a node, in the order of assignment; several after the loss of a node.
    stays: list[Stay]
    ended_s: float
    num_ops: int
    ops: list[OpRecord]
    #: Of the nodes there at the end that account for their memory.
    memory: dict[str, MemoryCounters] = field(default_factory=dict)

    def requests(self) -> Iterable[TaskRecord]:
        """Records of inference requests."""
        return (record for record in self.tasks.values() if isinstance(record.work, Request))

    def microbatches(self) -> Iterable[TaskRecord]:
        """Records of training tasks."""
        return (record for record in self.tasks.values() if isinstance(record.work, Microbatch))
