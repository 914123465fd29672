"""What the driver needs of the core and of training jobs."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from lemix.errors import LemixError
from lemix.internal.v1 import work_pb2
from services.scheduler.core.commands import Command
from services.scheduler.core.costs import OpRecord
from services.scheduler.core.events import Event
from services.scheduler.core.status import CoreSnapshot


class Core(Protocol):
    """What the driver needs of `SchedulerCore`."""

    def step(self, now_s: float, event: Event) -> list[Command]:
        """Take one event in and return what is to be done."""
        ...

    def next_wakeup_s(self) -> float | None:
        """When a Tick is needed."""
        ...

    def snapshot(self) -> CoreSnapshot:
        """State for status calls."""
        ...

    def op_records(self) -> Mapping[str, Sequence[OpRecord]]:
        """What was learnt of the operations of every node, by id."""
        ...


class TrainingJobs(Protocol):
    """Told what becomes of micro-batches. Must not block."""

    def is_wanted(self, item: work_pb2.WorkItem) -> bool:
        """Whether this micro-batch is to be trained: its job has not ended since."""
        ...

    def on_held(self, work: work_pb2.TrainingWork, *, waiting: bool) -> None:
        """The core holds this micro-batch: waiting for a node, or on one."""
        ...

    def on_refused(self, work: work_pb2.TrainingWork, error: LemixError) -> list[Event]:
        """The core refused it. Returns what the core must hear."""
        ...

    def on_taken_back(self, item: work_pb2.WorkItem) -> None:
        """The core gave it back because its job is paused."""
        ...

    def on_outcome(self, outcome: work_pb2.WorkOutcome) -> list[Event]:
        """It ended. May come twice. Returns what the core must hear."""
        ...

    def on_trained(self, outcome: work_pb2.WorkOutcome) -> None:
        """It was trained and is in no checkpoint yet: it ends with one, or is held again. May come twice."""
        ...

    def unsaved_on(self, node_id: str) -> list[work_pb2.WorkOutcome]:
        """What this node trained and is in no checkpoint, as far as it was told."""
        ...

    def on_node_away(self, node_id: str, wait_s: float, failover: str = "") -> None:
        """A node is lost; what it trained since its checkpoint waits so long for it, 0: no longer. failover: what
        became of its checkpoint."""
        ...
