"""Server-sent events, and noticing that a client has gone."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any, Generic, TypeVar

import structlog
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from lemix.errors import ErrorCode, LemixError
from services.gateway.problems import error_body

_log = structlog.get_logger()

T = TypeVar("T")

#: A client that takes nothing for this long is treated as gone.
_WRITE_TIMEOUT_S = 60.0

_DONE = b"data: [DONE]\n\n"
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # made once: json.dumps makes one per call


def encode_json(value: Any) -> bytes:
    """Compact JSON."""
    return _encode(value).encode()


def event(value: Mapping[str, Any]) -> bytes:
    """One event with a JSON object."""
    return b"data: " + encode_json(value) + b"\n\n"


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


class EventStream(Generic[T]):
    """ASGI response that sends events as they come and closes their source when the client goes away or is too slow.

    A LemixError of the source becomes the last event; otherwise that is OpenAI's `[DONE]`.
    """

    def __init__(
        self,
        source: AsyncGenerator[T],
        encode: Callable[[T], bytes],
        *,
        first: T | None = None,
        headers: Mapping[str, str] | None = None,
        write_timeout_s: float = _WRITE_TIMEOUT_S,
    ) -> None:
        """source: closed at the end, even if nothing was ever sent. encode: events of one item, possibly none.
        first: what was taken from `source` already. write_timeout_s: how long one write may be held up; noticed after
        at most twice as long."""
        self._source = source
        self._encode = encode
        self._first = first
        self._headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        self._headers.update(headers or {})
        self._write_timeout_s = write_timeout_s
        self._writing = False
        self._num_written = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the response."""
        sending = asyncio.ensure_future(self._send(send))
        watch = asyncio.ensure_future(_disconnected(receive))
        try:
            if await self._client_keeps_up(sending, watch):
                if sending.done():
                    sending.result()
            else:  # uvicorn closes the connection once its buffer is taken: http_server.py bounds the wait for that
                _log.info("client too slow", path=scope["path"], write_timeout_s=self._write_timeout_s)
        finally:
            await _end(sending)
            await _end(watch)

    async def _client_keeps_up(self, *tasks: asyncio.Future[None]) -> bool:
        """True when one of the tasks has ended; False when the same write was held up from one look to the next."""
        seen = -1
        while not (await asyncio.wait(tasks, timeout=self._write_timeout_s, return_when=asyncio.FIRST_COMPLETED))[0]:
            if self._writing and self._num_written == seen:
                return False
            seen = self._num_written if self._writing else -1
        return True

    async def _send(self, send: Send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in self._headers.items()]
        async with aclosing(self._source):
            await self._write(send, {"type": "http.response.start", "status": 200, "headers": headers})
            last = _DONE
            try:
                if self._first is not None:
                    await self._send_item(send, self._first)
                async for item in self._source:
                    await self._send_item(send, item)
            except LemixError as error:
                last = event(error_body(error))
            await self._write(send, {"type": "http.response.body", "body": last, "more_body": False})

    async def _send_item(self, send: Send, item: T) -> None:
        if data := self._encode(item):
            await self._write(send, {"type": "http.response.body", "body": data, "more_body": True})

    async def _write(self, send: Send, message: Message) -> None:
        self._writing = True
        await send(message)
        self._writing = False
        self._num_written += 1


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: asyncio.Future[Any]) -> None:
    if not task.done():
        task.cancel()
        with suppress(asyncio.CancelledError, LemixError):
            await task
