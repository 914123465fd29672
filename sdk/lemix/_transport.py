"""The seam between the clients and the wire. Replace it to test without a server (see lemix.testing)."""

from collections.abc import AsyncGenerator, Generator
from contextlib import suppress
from typing import Any, Protocol

import grpc
import grpc.aio

from lemix._calls import Call
from lemix.errors import LemixError

#: Largest message either way, bytes; the gateway's own bound.
_MAX_MESSAGE_BYTES = 16 * 1024 * 1024
_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


class Transport(Protocol):
    """Carries calls for the blocking client. Both methods raise LemixError only."""

    def unary(self, call: Call[Any], timeout_s: float) -> Any:
        """The response message."""
        ...

    def stream(self, call: Call[Any], timeout_s: float) -> Generator[Any]:
        """The response messages; closing the iterator cancels the call."""
        ...

    def close(self) -> None:
        """Release the connection."""
        ...


class AsyncTransport(Protocol):
    """Carries calls for the asyncio client. Both methods raise LemixError only."""

    async def unary(self, call: Call[Any], timeout_s: float) -> Any:
        """The response message."""
        ...

    def stream(self, call: Call[Any], timeout_s: float) -> AsyncGenerator[Any]:
        """The response messages; closing the iterator cancels the call."""
        ...

    async def close(self) -> None:
        """Release the connection."""
        ...


class GrpcTransport:
    """Transport over one gRPC channel."""

    def __init__(self, address: str) -> None:
        """address: host:port."""
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)

    def unary(self, call: Call[Any], timeout_s: float) -> Any:
        """See Transport."""
        method = self._channel.unary_unary(call.method, _serialise, call.response.FromString)
        try:
            return method(call.request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise LemixError.from_rpc(error) from error

    def stream(self, call: Call[Any], timeout_s: float) -> Generator[Any]:
        """See Transport."""
        method = self._channel.unary_stream(call.method, _serialise, call.response.FromString)
        messages = method(call.request, timeout=timeout_s)
        try:
            yield from messages
        except grpc.RpcError as error:
            raise LemixError.from_rpc(error) from error
        finally:
            messages.cancel()

    def close(self) -> None:
        """See Transport."""
        self._channel.close()


class AioGrpcTransport:
    """AsyncTransport over one gRPC channel."""

    def __init__(self, address: str) -> None:
        """address: host:port. Call inside an event loop."""
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)

    async def unary(self, call: Call[Any], timeout_s: float) -> Any:
        """See AsyncTransport."""
        method = self._channel.unary_unary(call.method, _serialise, call.response.FromString)
        try:
            return await method(call.request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise LemixError.from_rpc(error) from error

    async def stream(self, call: Call[Any], timeout_s: float) -> AsyncGenerator[Any]:
        """See AsyncTransport."""
        method = self._channel.unary_stream(call.method, _serialise, call.response.FromString)
        messages = method(call.request, timeout=timeout_s)
        try:
            async for message in messages:
                yield message
        except grpc.RpcError as error:
            raise LemixError.from_rpc(error) from error
        finally:
            with suppress(RuntimeError):  # the loop may be closing
                messages.cancel()

    async def close(self) -> None:
        """See AsyncTransport."""
        await self._channel.close()


def _serialise(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data
