"""Training that the scheduler has not been offered yet: what arrived, and what a stream still has to bring."""

import math
from collections import deque
from collections.abc import Callable, Iterator

from services.simulator.types import Microbatch


class TrainingSupply:
    """Micro-batches in the order they are to be offered, no more at a time than the core may hold.

    `stream` brings micro-batches by rising arrival time and may be endless: one is taken from it only when it can be
    offered, and `on_new` hears of it. A stream whose micro-batches all arrived at 0 is a backlog that never drains.
    """

    __slots__ = ("_backlog", "_head", "_most", "_offered", "_on_new", "_stream")

    def __init__(self, most: int, stream: Iterator[Microbatch], on_new: Callable[[Microbatch], None]) -> None:
        self._most = most
        self._backlog: deque[Microbatch] = deque()
        #: What waits in the core.
        self._offered: set[str] = set()
        self._stream = stream
        self._on_new = on_new
        self._head = next(stream, None)

    @property
    def next_arrival_s(self) -> float:
        """When the stream brings its next micro-batch; infinite: never."""
        return math.inf if self._head is None else self._head.arrival_s

    def arrived(self, work: Microbatch) -> None:
        """A micro-batch came by itself."""
        self._backlog.append(work)

    def has_next(self, until_s: float) -> bool:
        """Whether `take` would bring one."""
        if len(self._offered) >= self._most:
            return False
        return bool(self._backlog) or (self._head is not None and self._head.arrival_s <= until_s)

    def take(self, until_s: float) -> Microbatch | None:
        """The next micro-batch to offer, of the stream only one that arrived by `until_s`; it counts as offered.

        None: none is there, or room for none.

        Raises ValueError when the stream goes back in time.
        """
        if len(self._offered) >= self._most:
            return None
        if self._backlog:
            work = self._backlog.popleft()
        elif self._head is not None and self._head.arrival_s <= until_s:
            work = self._head
            self._on_new(work)
            self._head = next(self._stream, None)
            if self._head is not None and self._head.arrival_s < work.arrival_s:
                raise ValueError(f"task {self._head.task_id} arrives before the one before it in its stream")
        else:
            return None
        self._offered.add(work.task_id)
        return work

    def refused(self, work: Microbatch) -> None:
        """The core did not take it: its job keeps it and offers it again, before anything else."""
        self._offered.discard(work.task_id)
        self._backlog.appendleft(work)

    def waits_in_core(self, task_id: str) -> None:
        """The core has it wait again, because its node was lost."""
        self._offered.add(task_id)

    def left_core(self, task_id: str) -> None:
        """It waits in the core no longer."""
        self._offered.discard(task_id)
