"""A bidirectional gRPC stream that is opened again, with bounded pauses, for as long as it is wanted."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar, cast

import grpc
import grpc.aio
import structlog

_log = structlog.get_logger()

Sent = TypeVar("Sent")
Received = TypeVar("Received")

_FIRST_BACKOFF_S = 0.05


class ReconnectingStream(Generic[Sent, Received]):
    """Owns one logical stream over many connections. Messages are sent in order and at most once per connection.

    What a broken connection had not delivered is the owner's to say again: `greeting()` gives the first messages of
    every connection. The owner bounds the queue of outgoing messages: it sends a bounded number per request.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], grpc.aio.StreamStreamCall[Sent, Received]],
        *,
        greeting: Callable[[], Iterable[Sent]],
        receive: Callable[[Received], None],
        wanted: Callable[[], bool] = lambda: True,
        on_lost: Callable[[list[Sent]], None] = lambda _: None,
        max_backoff_s: float = 2.0,
    ) -> None:
        """name: for logs. wanted: asked after a loss; False ends `run`. on_lost: gets what was not sent then."""
        self._name = name
        self._connect = connect
        self._greeting = greeting
        self._receive = receive
        self._wanted = wanted
        self._on_lost = on_lost
        self._max_backoff_s = max_backoff_s
        self._outgoing: deque[Sent] = deque()
        self._something_to_send = asyncio.Event()
        self._open = False

    @property
    def backlog(self) -> int:
        """Messages that wait to be sent."""
        return len(self._outgoing)

    def send(self, message: Sent) -> None:
        """Queue a message on the current connection; without one it is left to the next greeting."""
        if self._open:
            self._outgoing.append(message)
            self._something_to_send.set()

    async def run(self) -> None:
        """Keep the stream open until cancelled or no longer wanted."""
        backoff_s = _FIRST_BACKOFF_S
        while True:
            heard = False

            def receive(message: Received) -> None:
                nonlocal heard
                heard = True
                self._receive(message)

            reason = await self._one_connection(receive)
            if not self._wanted():
                return
            backoff_s = _FIRST_BACKOFF_S if heard else min(2 * backoff_s, self._max_backoff_s)
            if heard:
                _log.warning("stream lost", stream=self._name, reason=reason, retry_in_s=round(backoff_s, 3))
            else:  # usual at start-up: services come up in any order
                _log.info("not connected yet", stream=self._name, retry_in_s=round(backoff_s, 3))
            await asyncio.sleep(backoff_s)

    async def _one_connection(self, receive: Callable[[Received], None]) -> str:
        """Run one connection to its end and tell why it ended."""
        call = self._connect()
        self._outgoing.clear()
        self._outgoing.extend(self._greeting())
        self._something_to_send.set()
        self._open = True
        tasks = [asyncio.create_task(self._write(call)), asyncio.create_task(_read(call, receive))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return _reason(done.pop())
        finally:
            self._open = False
            unsent = list(self._outgoing)
            self._outgoing.clear()
            self._on_lost(unsent)
            call.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _write(self, call: grpc.aio.StreamStreamCall[Sent, Received]) -> None:
        while True:
            await self._something_to_send.wait()
            self._something_to_send.clear()
            while self._outgoing:
                await call.write(self._outgoing[0])  # stays in the queue until it is sent: a loss hands it back
                self._outgoing.popleft()


async def _read(call: grpc.aio.StreamStreamCall[Sent, Received], receive: Callable[[Received], None]) -> None:
    while (message := await call.read()) is not grpc.aio.EOF:
        receive(cast(Received, message))
    if (code := await call.code()) is not grpc.StatusCode.OK:
        raise ConnectionError(f"{code.name}: {await call.details()}")


def _reason(task: asyncio.Task[Any]) -> str:
    if task.cancelled():
        return "cancelled"
    error = task.exception()
    if error is None:
        return "closed by the other side"
    if isinstance(error, ConnectionError | grpc.RpcError | asyncio.InvalidStateError):
        return str(error)
    raise error  # a fault of our own, not of the connection
