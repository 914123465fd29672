"""Server-sent events, and noticing that a client has gone."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from lemix.errors import ErrorCode, LemixError

T = TypeVar("T")

#: A client that takes nothing for this long is treated as gone.
_WRITE_TIMEOUT_S = 60.0

DONE = b"data: [DONE]\n\n"
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # made once: json.dumps makes one per call


def event(value: Mapping[str, Any]) -> bytes:
    """One event with a JSON object."""
    return b"data: " + _encode(value).encode() + b"\n\n"


async def until_disconnect(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, cancelled as soon as the client goes away (then CANCELLED). The body must be read."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise LemixError(ErrorCode.CANCELLED, "the client went away")
    finally:
        await _end(task)
        await _end(watch)


class EventStream:
    """ASGI response that sends events as they come and closes their source when the client goes away."""

    def __init__(
        self, events: AsyncGenerator[bytes], source: AsyncGenerator[Any], headers: Mapping[str, str] | None = None
    ) -> None:
        """events: encoded events, made from `source`. Both are closed at the end, even if nothing was ever sent."""
        self._events = events
        self._source = source
        self._headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        self._headers.update(headers or {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the response."""
        sending = asyncio.ensure_future(self._send(send))
        watch = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((sending, watch), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await _end(sending)
            await _end(watch)

    async def _send(self, send: Send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in self._headers.items()]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for data in self._events:
                async with asyncio.timeout(_WRITE_TIMEOUT_S):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._events.aclose()
            await self._source.aclose()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: asyncio.Future[Any]) -> None:
    if not task.done():
        task.cancel()
        with suppress(asyncio.CancelledError, LemixError):
            await task
