"""What happened to a job, as its owner and the ledger are told."""

import asyncio
from collections import deque
from collections.abc import Iterable
from itertools import takewhile

from lemix.v1 import types_pb2
from services.ledger.types import MAX_JOB_EVENTS


class JobEvents:
    """The newest events of one job, numbered from 1."""

    def __init__(self) -> None:
        self._kept: deque[types_pb2.JobEvent] = deque(maxlen=MAX_JOB_EVENTS)
        self._unsaved: deque[types_pb2.JobEvent] = deque(maxlen=MAX_JOB_EVENTS)
        #: Set once when anything a watcher sees has changed; then replaced by a new one.
        self.changed = asyncio.Event()

    def add(self, event: types_pb2.JobEvent) -> None:
        """Number an event, keep it and wake watchers."""
        event.sequence = self._kept[-1].sequence + 1 if self._kept else 1
        self._kept.append(event)
        self._unsaved.append(event)
        self.wake_watchers()

    def restore(self, events: Iterable[types_pb2.JobEvent]) -> None:
        """Take over a stored history. What a retry stored twice is taken once."""
        for event in events:
            if not self._kept or event.sequence > self._kept[-1].sequence:
                self._kept.append(event)

    def after(self, sequence: int) -> list[types_pb2.JobEvent]:
        """Kept events with a larger sequence, oldest first."""
        newest_first = takewhile(lambda event: event.sequence > sequence, reversed(self._kept))
        return list(newest_first)[::-1]

    def unsaved(self) -> list[types_pb2.JobEvent]:
        """Events that the ledger does not hold."""
        return list(self._unsaved)

    def saved(self, count: int) -> None:
        """The oldest unsaved events are stored now."""
        for _ in range(min(count, len(self._unsaved))):
            self._unsaved.popleft()

    def wake_watchers(self) -> None:
        """Let everyone who waits for a change look again."""
        self.changed.set()
        self.changed = asyncio.Event()
