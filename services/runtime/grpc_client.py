"""Channels to other services."""

import asyncio

import grpc
import grpc.aio

from services.runtime.app import StartupError
from services.runtime.grpc_server import MAX_MESSAGE_BYTES

_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to host:port; it connects by itself and reconnects with backoff of at most 2 s."""
    return grpc.aio.insecure_channel(address, options=_OPTIONS)


async def wait_connected(channel: grpc.aio.Channel, address: str, timeout_s: float, what: str) -> None:
    """Return when the channel is connected. Raises StartupError naming `what` and its address after `timeout_s`."""
    try:
        await asyncio.wait_for(channel.channel_ready(), timeout_s)
    except TimeoutError as error:
        raise StartupError(f"cannot reach {what} at {address} within {timeout_s:g} s") from error
