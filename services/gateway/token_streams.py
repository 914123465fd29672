"""Tokens from the nodes: one multiplexed stream per node address, whatever number of requests it carries."""

import asyncio
from collections.abc import Callable

import grpc.aio
import structlog

from lemix.internal.v1 import node_agent_service_pb2 as pb
from lemix.internal.v1 import node_agent_service_pb2_grpc as pb_grpc
from services.gateway.pending import PendingRequest
from services.gateway.reconnecting import ReconnectingStream
from services.runtime.grpc_client import open_channel

_log = structlog.get_logger()


class TokenStreams:
    """Opens streams to nodes as requests are assigned to them, and closes those that break when nobody waits."""

    def __init__(
        self,
        gateway_id: str,
        *,
        max_backoff_s: float = 2.0,
        open_node_channel: Callable[[str], grpc.aio.Channel] = open_channel,
    ) -> None:
        self._gateway_id = gateway_id
        self._max_backoff_s = max_backoff_s
        self._open_channel = open_node_channel
        self._streams: dict[str, _NodeStream] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def attach(self, pending: PendingRequest) -> None:
        """Ask the request's node for its tokens, from the first one not received yet. Idempotent."""
        address = pending.node_address
        for stream in self._streams.values():
            if stream.address != address:
                stream.forget(pending.request_id)
        if address not in self._streams:
            stream = _NodeStream(address, self._gateway_id, self._open_channel(address), self._max_backoff_s)
            self._streams[address] = stream
            task = asyncio.create_task(self._run(stream))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._streams[address].attach(pending)

    def detach(self, request_id: str) -> None:
        """Nobody waits for this request any more."""
        for stream in self._streams.values():
            stream.forget(request_id)

    async def close(self) -> None:
        """End every stream."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, stream: "_NodeStream") -> None:
        try:
            await stream.run()
        finally:
            if self._streams.get(stream.address) is stream:
                del self._streams[stream.address]
            await stream.close()


class _NodeStream:
    """The stream to one node."""

    def __init__(self, address: str, gateway_id: str, channel: grpc.aio.Channel, max_backoff_s: float) -> None:
        self.address = address
        self._gateway_id = gateway_id
        self._channel = channel
        self._waiting: dict[str, PendingRequest] = {}
        stub = pb_grpc.NodeAgentServiceStub(channel)
        self._stream: ReconnectingStream[pb.StreamTokensRequest, pb.StreamTokensResponse] = ReconnectingStream(
            f"tokens from {address}",
            lambda: stub.StreamTokens(),
            greeting=lambda: [self._request(pending) for pending in self._waiting.values()],
            receive=self._receive,
            wanted=lambda: bool(self._waiting),
            max_backoff_s=max_backoff_s,
        )

    def attach(self, pending: PendingRequest) -> None:
        self._waiting[pending.request_id] = pending
        self._stream.send(self._request(pending))

    def forget(self, request_id: str) -> None:
        self._waiting.pop(request_id, None)

    async def run(self) -> None:
        await self._stream.run()

    async def close(self) -> None:
        await self._channel.close()

    def _request(self, pending: PendingRequest) -> pb.StreamTokensRequest:
        return pb.StreamTokensRequest(
            request_id=pending.request_id, offset=pending.num_received, gateway_id=self._gateway_id
        )

    def _receive(self, message: pb.StreamTokensResponse) -> None:
        for chunk in message.chunks:
            pending = self._waiting.get(chunk.request_id)
            if pending is None:
                continue
            pending.on_tokens(self.address, chunk.offset, chunk.token_ids, chunk.logprobs)
            # What an earlier attempt ended with is for the scheduler's link, which submits anew.
            if chunk.HasField("outcome") and not pending.is_foreign_cancel(chunk.outcome):
                pending.on_finished(chunk.outcome)
            if pending.finished:
                self.forget(chunk.request_id)
