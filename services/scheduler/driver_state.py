"""What the parts of the driver share: the tasks the core knows, and whom they tell."""

from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import work_pb2
from services.ledger import Delivery, Ledger
from services.runtime.clock import Clock
from services.scheduler.core.events import Event
from services.scheduler.driver_ports import TrainingJobs
from services.scheduler.gateways import GatewayRegistry
from services.scheduler.guard import LedgerGuard
from services.scheduler.nodes import NodeRegistry

#: Cancelled requests remembered until the ledger delivers them.
_MAX_EARLY_CANCELS = 16_384

#: Takes an event into the core and performs what follows from it.
Step = Callable[[Event], Awaitable[None]]


@dataclass(slots=True)
class Held:
    """A task the core knows."""

    item: work_pb2.WorkItem
    entry_id: str | None = None
    #: Entry it was assigned from: whoever reads that again learns nothing.
    assigned_entry_id: str | None = None
    node_id: str = ""
    #: Submitted anew after its cancellation on the node, which has not been reported yet.
    again: Delivery | None = None


@dataclass(slots=True, kw_only=True)
class DriverState:
    """Owned by the driver; its parts run one at a time."""

    guard: LedgerGuard
    nodes: NodeRegistry
    gateways: GatewayRegistry
    jobs: TrainingJobs
    clock: Clock
    #: Fencing token that signs every move.
    token: int = 0
    tasks: dict[str, Held] = field(default_factory=dict)
    #: Submitted anew, the attempt before is over: taken in after what is being performed.
    again: deque[Delivery] = field(default_factory=deque)
    #: What performing commands made known to the core, before anything else is taken in.
    followups: deque[Event] = field(default_factory=deque)
    _early_cancels: OrderedDict[str, None] = field(default_factory=OrderedDict)

    @property
    def ledger(self) -> Ledger:
        """Waited for while it is away: see `guard`."""
        return self.guard.ledger

    def forget(self, held: Held) -> None:
        """The core is done with it, but not with what was submitted anew."""
        del self.tasks[held.item.task_id]
        if held.again is not None:
            self.again.append(held.again)

    def cancel_early(self, task_id: str) -> None:
        """Remember a cancelled request until the ledger delivers it."""
        self._early_cancels[task_id] = None
        while len(self._early_cancels) > _MAX_EARLY_CANCELS:
            self._early_cancels.popitem(last=False)

    def take_early_cancel(self, task_id: str) -> bool:
        """Whether it was cancelled before it came; asked once."""
        if task_id not in self._early_cancels:
            return False
        del self._early_cancels[task_id]
        return True

    def refusal(self, item: work_pb2.WorkItem) -> LemixError | None:
        """Why accepted work need not run any more."""
        if self.take_early_cancel(item.task_id):
            return LemixError(ErrorCode.CANCELLED, "the request was cancelled")
        if item.HasField("training") and not self.jobs.is_wanted(item):
            return LemixError(ErrorCode.CANCELLED, "its job has ended")
        return self.overdue(item)

    def overdue(self, item: work_pb2.WorkItem) -> LemixError | None:
        """Why it is too late for this request; None: it is not."""
        deadline_unix_s = item.inference.deadline_unix_s
        if 0.0 < deadline_unix_s <= self.clock.unix_s():
            return LemixError(ErrorCode.DEADLINE_EXCEEDED, "its deadline passed before a node could take it")
        return None
