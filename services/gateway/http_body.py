"""Reading request bodies: bounded, typed, and of the right kind."""

import asyncio
import json
import re
from contextlib import suppress
from typing import TypeVar

from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lemix.errors import ErrorCode, LemixError
from services.gateway.problems import HttpProblem, from_validation
from services.gateway.schemas import Body

B = TypeVar("B", bound=Body)

#: What a form adds to the file in it.
_FORM_OVERHEAD_BYTES = 64 * 1024
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_DISCARD_BYTES = 16 * 1024 * 1024
_DISCARD_TIMEOUT_S = 5.0


class BodyLimit:
    """ASGI middleware: bodies beyond the limit fail with 413 while they are read, whatever they announced."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_file_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_upload_bytes = max_file_bytes + _FORM_OVERHEAD_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a counted `receive`."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._max_upload_bytes if scope["path"] == "/v1/files" else self._max_body_bytes
        announced = Headers(scope=scope).get("content-length", "0")
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > limit or (announced.isdecimal() and int(announced) > limit):
                if message.get("more_body", False):
                    await discard(receive, limit)
                raise too_large(limit)
            return message

        await self._app(scope, counted, send)


async def discard(receive: Receive, limit: int) -> None:
    """Read an unfinished body on for a while: a client that is still sending would see a reset connection instead of
    the answer. limit: largest body that is taken, bytes; somewhat more is read."""
    num_bytes = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_TIMEOUT_S):
            while num_bytes < limit + _DISCARD_BYTES:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def too_large(limit: int) -> HttpProblem:
    """The 413 problem."""
    # The rest of the body is not read, so the connection cannot be used again.
    return HttpProblem(413, "request_too_large", f"the body is larger than {limit} bytes", {"connection": "close"})


async def read_json(request: Request, schema: type[B]) -> B:
    """The body as a schema. Raises INVALID_JSON, INVALID_REQUEST naming the field, HttpProblem 413 and 415."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HttpProblem(415, "unsupported_media_type", f"send application/json, not {kind[:100]!r}")
    try:
        text = (await request.body()).decode("utf-8")
        content = json.loads(text)
        if _SURROGATE.search(text):  # an escape may be half of a pair: only then is the whole body looked at again
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise LemixError(ErrorCode.INVALID_JSON, f"the body is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise LemixError(ErrorCode.INVALID_REQUEST, "the body must be a JSON object")
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise from_validation(error) from error
