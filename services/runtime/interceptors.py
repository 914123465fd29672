"""What every gRPC server does around a handler: map errors and count."""

import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
import grpc.aio
import prometheus_client
import structlog

from lemix.errors import METADATA_KEY, ErrorCode, LemixError

_log = structlog.get_logger()

_CALLS = prometheus_client.Counter("lemix_grpc_calls_total", "Finished gRPC calls", ["method", "code"])
_SECONDS = prometheus_client.Histogram("lemix_grpc_call_seconds", "Duration of gRPC calls", ["method"])

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns a LemixError into its status and metadata, anything else into INTERNAL without details.

    Handlers just raise; the caller never sees an internal message or a traceback.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler of this call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method.rsplit("/", 1)[-1]
        if handler.response_streaming:
            wrap = _streaming(method, handler.stream_stream or handler.unary_stream)
            factory = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
        else:
            wrap = _single(method, handler.stream_unary or handler.unary_unary)
            factory = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
        return factory(wrap, handler.request_deserializer, handler.response_serializer)


def _single(method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
    async def call(request: Any, context: Context) -> Any:
        started = time.monotonic()
        try:
            response = await behaviour(request, context)
        except Exception as error:
            await _abort(method, context, error)
        else:
            _CALLS.labels(method, "OK").inc()
            return response
        finally:
            _SECONDS.labels(method).observe(time.monotonic() - started)

    return call


def _streaming(method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
    async def call(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            responses = behaviour(request, context)
            if inspect.isawaitable(responses):  # writes to the context itself, as grpc's own health service does
                await responses
            else:
                async with aclosing(responses):  # a cancelled call ends its handler now, not when it is collected
                    async for response in responses:
                        yield response
        except Exception as error:
            await _abort(method, context, error)
        else:
            _CALLS.labels(method, "OK").inc()

    return call


async def _abort(method: str, context: Context, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, LemixError):
        _log.error("handler failed", method=method, exc_info=error)
        error = LemixError(ErrorCode.INTERNAL, "internal error")
    _CALLS.labels(method, error.status.name).inc()
    metadata = ((METADATA_KEY, error.to_proto().SerializeToString()),)
    await context.abort(error.status, error.message, trailing_metadata=metadata)
