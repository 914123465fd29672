"""Event streams: what is sent, and clients that take nothing."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
from starlette.types import Message, Scope
from structlog.testing import capture_logs

from lemix.errors import ErrorCode, LemixError
from services.gateway.http_stream import EventStream

_SCOPE: Scope = {"type": "http", "path": "/v1/completions"}


class _Source:
    """Numbers, then an error if there is one; notes its closing."""

    def __init__(self, count: int, error: LemixError | None = None) -> None:
        self._count = count
        self._error = error
        self.closed = False

    async def items(self) -> AsyncGenerator[int]:
        try:
            for number in range(self._count):
                yield number
            if self._error is not None:
                raise self._error
        finally:
            self.closed = True


def _encode(number: int) -> bytes:
    return b"" if number == 1 else b"%d;" % number


async def _stays() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def _sent(stream: EventStream[int]) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(dict(message))

    await stream(_SCOPE, _stays, send)
    return sent


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    with capture_logs() as found:
        yield found


async def test_items_and_the_end() -> None:
    source = _Source(3)
    start, *bodies = await _sent(EventStream(source.items(), _encode, headers={"x-request-id": "r"}))
    assert (start["status"], dict(start["headers"])[b"x-request-id"]) == (200, b"r")
    # The second item has nothing to show.
    assert [(body["body"], body["more_body"]) for body in bodies] == [
        (b"0;", True),
        (b"2;", True),
        (b"data: [DONE]\n\n", False),
    ]
    assert source.closed


async def test_what_was_taken_already_comes_first() -> None:
    _, first, *_ = await _sent(EventStream(_Source(1).items(), _encode, first=7))
    assert first["body"] == b"7;"


async def test_an_error_is_the_last_event() -> None:
    source = _Source(1, LemixError(ErrorCode.NODE_LOST, "gone"))
    *_, last = await _sent(EventStream(source.items(), _encode))
    assert b'"code":"node_lost"' in last["body"]
    assert not last["more_body"]


async def test_a_client_that_takes_nothing_is_given_up_and_told_as_such(logs: list[Any]) -> None:
    source = _Source(3)

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    await EventStream(source.items(), _encode, write_timeout_s=0.01)(_SCOPE, _stays, send)
    assert source.closed
    assert [(entry["event"], entry["log_level"]) for entry in logs] == [("client too slow", "info")]


async def test_waiting_for_a_slow_source_is_not_the_clients_fault(
    logs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet, looks, wait = asyncio.Event(), 0, asyncio.wait

    async def items() -> AsyncGenerator[int]:
        yield 0
        await quiet.wait()

    async def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal looks
        looks += 1
        if looks == 5:
            quiet.set()
        return await wait(*args, **kwargs)

    monkeypatch.setattr(asyncio, "wait", counted)
    *_, last = await _sent(EventStream(items(), _encode, write_timeout_s=0.001))
    assert not last["more_body"]
    assert logs == []


async def test_a_write_held_up_for_a_moment_after_an_idle_time_is_not_too_slow(
    logs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    idle, quiet, held, go = (asyncio.Event() for _ in range(4))
    looks, wait = 0, asyncio.wait

    async def items() -> AsyncGenerator[int]:
        yield 0
        idle.set()
        await quiet.wait()
        yield 2

    async def send(message: Message) -> None:
        if message.get("body") == b"2;":
            held.set()
            await go.wait()

    async def look(tasks: Any, **kwargs: Any) -> Any:
        nonlocal looks
        looks += 1
        if looks == 1:
            await idle.wait()
        elif looks == 2:
            quiet.set()
            await held.wait()
        else:
            go.set()
            return await wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return set(), set(tasks)

    monkeypatch.setattr(asyncio, "wait", look)
    await EventStream(items(), _encode)(_SCOPE, _stays, send)
    assert looks == 3
    assert logs == []


async def test_a_client_that_goes_closes_the_source() -> None:
    gone = asyncio.Event()

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        gone.set()

    closed = False

    async def items() -> AsyncGenerator[int]:
        nonlocal closed
        try:
            yield 0
            await asyncio.Event().wait()
        finally:
            closed = True

    await EventStream(items(), _encode)(_SCOPE, receive, send)
    assert closed
