"""Where the latency of a joining node comes from."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import grpc.aio
import structlog
from google.protobuf import json_format

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import profile_pb2, profiler_service_pb2, profiler_service_pb2_grpc, scheduler_service_pb2
from services.latency import NodeLatency
from services.profile_messages import latency_from_profile
from services.runtime.app import StartupError

if TYPE_CHECKING:
    from lemix.internal.v1.profiler_service_pb2_grpc import ProfilerServiceAsyncStub

_log = structlog.get_logger()

_LOOKUP_TIMEOUT_S = 5.0


class ProfileSource(Protocol):
    """Finds the latency models of a node."""

    async def latency(self, hello: scheduler_service_pb2.NodeHello) -> NodeLatency:
        """Models of the node. Raises LemixError when there are none and none can be measured."""
        ...

    async def close(self) -> None:
        """Release connections."""
        ...


class StoredProfile:
    """One profile from a file, for every node."""

    def __init__(self, path: Path) -> None:
        """Raises StartupError when the file is not a usable profile."""
        try:
            profile = json_format.Parse(path.read_text(encoding="utf-8"), profile_pb2.Profile())
            self._latency = latency_from_profile(profile)
        except (OSError, ValueError, json_format.ParseError) as error:
            raise StartupError(f"profile_path: {path} is not a usable profile: {error}") from error

    async def latency(self, hello: scheduler_service_pb2.NodeHello) -> NodeLatency:
        """The stored models."""
        del hello
        return self._latency

    async def close(self) -> None:
        """Nothing to release."""


class ProfilerClient:
    """Asks the profiler, which measures nodes of a kind that it does not know.

    Nodes of one kind that join together are measured at the same time, so that nodes that share a machine are measured
    as they will run: under each other's load on memory and caches. Later ones get the newest stored profile.
    """

    def __init__(self, channel: grpc.aio.Channel, *, measure_timeout_s: float) -> None:
        self._channel = channel
        self._stub: ProfilerServiceAsyncStub = profiler_service_pb2_grpc.ProfilerServiceStub(channel)
        self._measure_timeout_s = measure_timeout_s

    async def latency(self, hello: scheduler_service_pb2.NodeHello) -> NodeLatency:
        """Stored or measured models."""
        try:
            profile = await self._stored(hello.profile_fingerprint)
            if profile is None:
                _log.info("measuring a new node", node=hello.node_id, address=hello.address)
                request = profiler_service_pb2.ProfileNodeRequest(node_address=hello.address)
                response = await self._stub.ProfileNode(request, timeout=self._measure_timeout_s)
                profile = response.profile
        except grpc.aio.AioRpcError as error:
            raise LemixError.from_rpc(error) from error
        try:
            return latency_from_profile(profile)
        except ValueError as error:
            raise LemixError(ErrorCode.CONFLICT, str(error)) from error

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    async def _stored(self, fingerprint: str) -> profile_pb2.Profile | None:
        request = profiler_service_pb2.GetProfileRequest(fingerprint=fingerprint)
        try:
            response = await self._stub.GetProfile(request, timeout=_LOOKUP_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if LemixError.from_rpc(error).code is ErrorCode.NOT_FOUND:
                return None
            raise
        return response.profile
