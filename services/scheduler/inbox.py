"""What reaches the driver, in one bounded queue."""

import asyncio
from dataclasses import dataclass

from lemix.internal.v1 import work_pb2
from services.ledger import Delivery
from services.scheduler import metrics
from services.scheduler.core.events import Event, OpFinished
from services.scheduler.core.node_spec import NodeSpec


@dataclass(frozen=True, slots=True)
class Delivered:
    """The ledger handed over an accepted task."""

    delivery: Delivery


@dataclass(frozen=True, slots=True)
class Offered:
    """The feeder cut a micro-batch; it is in no stream yet."""

    item: work_pb2.WorkItem


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """Nobody waits for this request any more."""

    task_id: str


@dataclass(frozen=True, slots=True)
class NodeArrived:
    """A node's session is open."""

    spec: NodeSpec


@dataclass(frozen=True, slots=True)
class NodeGone:
    """A node's session has ended, or the node never came back after a restart of the scheduler.

    may_return: it may come back from a checkpoint, and what it trained since waits for it.
    """

    node_id: str
    reason: str
    may_return: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """A node reported an outcome; it is in the ledger already."""

    outcome: work_pb2.WorkOutcome


@dataclass(frozen=True, slots=True)
class Trained:
    """A node trained a micro-batch; no checkpoint contains it, and the ledger does not hold it as done, yet."""

    outcome: work_pb2.WorkOutcome


@dataclass(frozen=True, slots=True)
class Traced:
    """Operations a node finished, oldest first."""

    ops: tuple[OpFinished, ...]


@dataclass(frozen=True, slots=True)
class Told:
    """An event for the core as it is."""

    event: Event


Message = Delivered | Offered | CancelRequested | NodeArrived | NodeGone | Ended | Trained | Traced | Told


class Inbox:
    """Senders wait when it is full; traces give way long before, because they only calibrate."""

    def __init__(self, max_messages: int) -> None:
        self._queue: asyncio.Queue[Message] = asyncio.Queue(max_messages)
        self._max_messages = max_messages

    async def put(self, message: Message) -> None:
        """Add a message; waits for room."""
        await self._queue.put(message)

    def put_trace(self, traced: Traced) -> None:
        """Add traces unless the driver is behind."""
        if self._queue.qsize() >= self._max_messages // 2:
            metrics.DROPPED_TRACES.inc(len(traced.ops))
        elif traced.ops:
            self._queue.put_nowait(traced)

    async def get(self, timeout_s: float | None) -> Message | None:
        """The next message; None after `timeout_s` without one."""
        if not self._queue.empty():
            return self._queue.get_nowait()
        if timeout_s is None:
            return await self._queue.get()
        try:
            async with asyncio.timeout(timeout_s):
                return await self._queue.get()
        except TimeoutError:
            return None
