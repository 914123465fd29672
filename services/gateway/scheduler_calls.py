"""Calls to the scheduler with a deadline, failing as LemixError."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio

from lemix.errors import ErrorCode, LemixError

R = TypeVar("R")

_RETRY_AFTER_S = 1.0


async def call(method: Callable[..., Awaitable[R]], request: Any, timeout_s: float) -> R:
    """One answer. request: a message, or an iterator of messages for a client stream."""
    try:
        return await method(request, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        raise _translate(error) from error


async def follow(method: Callable[..., Any], request: Any, timeout_s: float) -> AsyncGenerator[Any]:
    """A stream of answers; closing the generator cancels the call."""
    stream = method(request, timeout=timeout_s)
    try:
        async for message in stream:
            yield message
    except grpc.aio.AioRpcError as error:
        raise _translate(error) from error
    finally:
        stream.cancel()


def _translate(error: grpc.aio.AioRpcError) -> LemixError:
    failure = LemixError.from_rpc(error)
    if failure.code is ErrorCode.UNAVAILABLE and failure.retry_after_s is None:
        # grpc's own words name addresses; clients need only know that it may pass.
        return LemixError(
            ErrorCode.UNAVAILABLE, "the scheduler is not reachable right now", retry_after_s=_RETRY_AFTER_S
        )
    return failure
