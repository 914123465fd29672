"""The reconnecting stream over connections that a test plays."""

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest

from services.gateway.reconnecting import ReconnectingStream


class FakeCall:
    """One connection: `incoming` is what the other side says; an exception breaks it, EOF ends it."""

    def __init__(self, *incoming: Any, accepts: int = 1000) -> None:
        self.incoming: asyncio.Queue[Any] = asyncio.Queue()
        for message in incoming:
            self.incoming.put_nowait(message)
        self.sent: list[str] = []
        self.cancelled = False
        self._accepts = accepts

    async def write(self, message: str) -> None:
        if len(self.sent) >= self._accepts:
            await asyncio.Event().wait()  # the other side does not read
        self.sent.append(message)

    async def read(self) -> Any:
        message = await self.incoming.get()
        if isinstance(message, Exception):
            raise message
        return message

    async def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.OK

    async def details(self) -> str:
        return ""

    def cancel(self) -> None:
        self.cancelled = True


class Harness:
    """A stream over a list of calls; it is wanted while calls are left."""

    def __init__(self, *calls: FakeCall) -> None:
        self.calls = list(calls)
        self.opened: list[FakeCall] = []
        self.received: list[str] = []
        self.unsent: list[list[str]] = []
        self.greeted = asyncio.Event()
        self.stream: ReconnectingStream[str, str] = ReconnectingStream(
            "test",
            self._connect,  # type: ignore[arg-type]
            greeting=lambda: ["hello"],
            receive=self.received.append,
            wanted=lambda: bool(self.calls),
            on_lost=self.unsent.append,
            max_backoff_s=0.001,
        )

    def _connect(self) -> FakeCall:
        call = self.calls.pop(0)
        self.opened.append(call)
        return call


async def test_every_connection_begins_with_the_greeting() -> None:
    harness = Harness(FakeCall("a", ConnectionError("broken")), FakeCall("b", grpc.aio.EOF))
    async with asyncio.timeout(5):
        await harness.stream.run()
    assert harness.received == ["a", "b"]
    assert [call.sent for call in harness.opened] == [["hello"], ["hello"]]
    assert all(call.cancelled for call in harness.opened)


async def test_what_was_not_sent_is_handed_back() -> None:
    call = FakeCall(accepts=1)
    harness = Harness(call)
    run = asyncio.create_task(harness.stream.run())
    await asyncio.sleep(0)
    harness.stream.send("x")
    harness.stream.send("y")
    harness.stream.send("z")
    call.incoming.put_nowait(grpc.aio.EOF)
    async with asyncio.timeout(5):
        await run
    assert call.sent == ["hello"]
    assert harness.unsent == [["x", "y", "z"]]
    assert harness.stream.backlog == 0


async def test_without_a_connection_nothing_is_queued() -> None:
    harness = Harness()
    harness.stream.send("x")
    assert harness.stream.backlog == 0


async def test_a_fault_of_our_own_is_not_hidden() -> None:
    harness = Harness(FakeCall("a"), FakeCall())

    def broken(_: str) -> None:
        raise ZeroDivisionError

    harness.stream._receive = broken
    async with asyncio.timeout(5):
        with pytest.raises(ZeroDivisionError):
            await harness.stream.run()


async def test_cancelling_ends_the_connection() -> None:
    call = FakeCall()
    harness = Harness(call, FakeCall())
    run = asyncio.create_task(harness.stream.run())
    await asyncio.sleep(0)
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)
    assert call.cancelled
    assert len(harness.opened) == 1
