"""Messages for one peer, in a bounded queue that never makes the sender wait."""

import asyncio
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

M = TypeVar("M")


class Outbox(Generic[M]):
    """Filled by the driver, drained by the peer's stream. A peer that is too slow is cut off, not waited for."""

    def __init__(self, max_messages: int) -> None:
        self._queue: asyncio.Queue[M | None] = asyncio.Queue(max_messages + 1)  # one place for the end
        self._max_messages = max_messages
        #: Why the stream was closed; empty while it is open.
        self.closed_reason = ""

    def send(self, message: M) -> bool:
        """Queue a message. False when the stream is closed, also by this message being one too many."""
        if self.closed_reason:
            return False
        if self._queue.qsize() >= self._max_messages:
            self.close("it does not read its messages")
            return False
        self._queue.put_nowait(message)
        return True

    def close(self, reason: str) -> None:
        """End the stream after what is queued; idempotent."""
        if not self.closed_reason:
            self.closed_reason = reason
            self._queue.put_nowait(None)

    async def messages(self) -> AsyncIterator[M]:
        """What is sent, until closed."""
        while (message := await self._queue.get()) is not None:
            yield message
