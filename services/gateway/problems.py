"""Failures as OpenAI-shaped HTTP answers. The only place where an error becomes HTTP."""

import math
from typing import Any

import structlog
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from lemix.errors import ErrorCode, LemixError

_log = structlog.get_logger()

_STATUS = {
    ErrorCode.INVALID_REQUEST: 400,
    ErrorCode.INVALID_JSON: 400,
    ErrorCode.MODEL_NOT_FOUND: 404,
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: 400,
    ErrorCode.INVALID_TRAINING_FILE: 400,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.OVERLOADED: 429,
    ErrorCode.DEADLINE_EXCEEDED: 504,
    ErrorCode.CANCELLED: 499,
    ErrorCode.NODE_LOST: 503,
    ErrorCode.UNAVAILABLE: 503,
    ErrorCode.RESOURCE_EXHAUSTED: 400,
    ErrorCode.CONFLICT: 409,
    ErrorCode.INTERNAL: 500,
    ErrorCode.UNSUPPORTED: 400,
    ErrorCode.STALE_WEIGHTS: 412,
}


class HttpProblem(Exception):
    """A failure that only exists in HTTP: a route, a method, a size."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers or {}


def error_body(error: LemixError) -> dict[str, Any]:
    """The OpenAI error object, for an answer or for an event inside a stream."""
    return _body(_STATUS[error.code], error.code.value, error.message, error.param)


async def on_lemix_error(_: Request, error: Exception) -> JSONResponse:
    """Answer a LemixError."""
    assert isinstance(error, LemixError)
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    elif error.code in (ErrorCode.CONFLICT, ErrorCode.CANCELLED):
        headers["x-should-retry"] = "false"  # OpenAI's clients would try a 409 again
    return JSONResponse(error_body(error), _STATUS[error.code], headers)


async def on_http_problem(_: Request, error: Exception) -> JSONResponse:
    """Answer an HttpProblem."""
    assert isinstance(error, HttpProblem)
    return JSONResponse(_body(error.status, error.code, error.message, None), error.status, error.headers)


async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Answer what Starlette itself refuses: unknown routes, wrong methods, broken forms."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        code, message = ErrorCode.NOT_FOUND.value, f"there is no route {request.method} {request.url.path[:200]}"
    elif error.status_code == 405:
        code, message = "method_not_allowed", f"{request.method} is not allowed on {request.url.path[:200]}"
    else:
        code, message = ErrorCode.INVALID_REQUEST.value, error.detail
    return JSONResponse(_body(error.status_code, code, message, None), error.status_code, dict(error.headers or {}))


async def on_unexpected(request: Request, error: Exception) -> JSONResponse:
    """Answer a fault of our own without its details."""
    _log.error("request failed", path=request.url.path, exc_info=error)
    return JSONResponse(_body(500, ErrorCode.INTERNAL.value, "internal error", None), 500)


def from_validation(error: ValidationError) -> LemixError:
    """The first thing wrong with a body, by its dotted path."""
    found = error.errors(include_url=False, include_input=False)
    first = found[0]
    path = ".".join(str(part) for part in first["loc"] if not _is_union_branch(part))
    if first["type"] == "value_error":  # raised by a validator of ours, a whole sentence
        return LemixError(ErrorCode.INVALID_REQUEST, str(first["ctx"]["error"]), param=path or None)
    # A union reports every form it tried: all of them together say what would be right.
    forms = dict.fromkeys(item["msg"] for item in found if item["loc"][:1] == first["loc"][:1])
    reason = " or ".join(forms) if len(first["loc"]) > 1 and _is_union_branch(first["loc"][1]) else first["msg"]
    message = f"{path}: {reason}" if path else reason
    return LemixError(ErrorCode.INVALID_REQUEST, message, param=path or None)


def _is_union_branch(part: int | str) -> bool:
    """pydantic puts the branch of a union it tried into the path ("str", "list[int]"); clients did not write that."""
    return isinstance(part, str) and (part in ("str", "int", "float", "bool") or "[" in part or part[:1].isupper())


def _body(status: int, code: str, message: str, param: str | None) -> dict[str, Any]:
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
