"""Where the latency of a joining node comes from."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import grpc.aio
import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import profile_pb2, profiler_service_pb2, profiler_service_pb2_grpc, scheduler_service_pb2
from services.latency import NodeLatency, OpKind
from services.profile_artifact import ArtifactError, load_artifact
from services.profile_messages import KIND_OF_PROTO, latency_from_profile
from services.runtime.app import StartupError

if TYPE_CHECKING:
    from lemix.internal.v1.profiler_service_pb2_grpc import ProfilerServiceAsyncStub

_log = structlog.get_logger()

_LOOKUP_TIMEOUT_S = 5.0
#: An incomplete profile that has all of these is as good as a complete one to predict with.
_NEEDED = frozenset((OpKind.PREFILL, OpKind.DECODE, OpKind.TRAIN_FORWARD, OpKind.TRAIN_BACKWARD, OpKind.OPTIMIZER_STEP))


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
            self._profile = load_artifact(path)
            self._latency = latency_from_profile(self._profile)
        except ArtifactError as error:
            raise StartupError(f"profile_path: {error}") from error
        except ValueError as error:
            raise StartupError(f"profile_path: {path} is not a profile: {error}") from error

    async def latency(self, hello: scheduler_service_pb2.NodeHello) -> NodeLatency:
        """The stored models. Raises LemixError CONFLICT for a node that serves another model."""
        profile = self._profile
        if profile.model and hello.model and profile.model != hello.model:
            message = (
                f"node {hello.node_id} serves {hello.model!r}, profile {profile.profile_id} is of {profile.model!r}"
            )
            raise LemixError(ErrorCode.CONFLICT, message)
        return self._latency

    async def close(self) -> None:
        """Nothing to release."""


class ProfilerClient:
    """Asks the profiler, which measures nodes of a kind that it does not know.

    Nodes of one kind that join together are measured at the same time, so that nodes that share a machine are measured
    as they will run: under each other's load on memory and caches. Later ones get the newest stored profile; one that
    lacks an operation, because its measurement did not get to its end, only if the node cannot be measured now.
    """

    def __init__(self, channel: grpc.aio.Channel, *, measure_timeout_s: float) -> None:
        self._channel = channel
        self._stub: ProfilerServiceAsyncStub = profiler_service_pb2_grpc.ProfilerServiceStub(channel)
        self._measure_timeout_s = measure_timeout_s

    async def latency(self, hello: scheduler_service_pb2.NodeHello) -> NodeLatency:
        """Stored or measured models."""
        try:
            profile = await self._stored(hello.profile_fingerprint)
            if profile is None or _lacks_something(profile):
                profile = await self._measured(hello, profile)
        except grpc.aio.AioRpcError as error:
            raise LemixError.from_rpc(error) from error
        try:
            return latency_from_profile(profile)
        except ValueError as error:
            raise LemixError(ErrorCode.CONFLICT, str(error)) from error

    async def measure_again(self, node_id: str, address: str, budget_s: float) -> NodeLatency:
        """Models of a node that may get work meanwhile: it is measured between its operations. Raises LemixError."""
        request = profiler_service_pb2.ProfileNodeRequest(node_address=address, budget_s=budget_s, allow_busy=True)
        try:
            profile = await self._run(request, node_id)
        except grpc.aio.AioRpcError as error:
            raise LemixError.from_rpc(error) from error
        if _lacks_something(profile):
            raise LemixError(ErrorCode.CONFLICT, f"profile {profile.profile_id}: {profile.incomplete_reason}")
        try:
            return latency_from_profile(profile)
        except ValueError as error:
            raise LemixError(ErrorCode.CONFLICT, str(error)) from error

    async def _measured(
        self, hello: scheduler_service_pb2.NodeHello, partial: profile_pb2.Profile | None
    ) -> profile_pb2.Profile:
        """A new profile; when that fails, the partial one if there is any. Raises AioRpcError, LemixError."""
        _log.info("measuring a new node", node=hello.node_id, address=hello.address)
        request = profiler_service_pb2.ProfileNodeRequest(node_address=hello.address)
        try:
            return await self._run(request, hello.node_id)
        except grpc.aio.AioRpcError as error:
            if partial is None:
                raise
            reason = LemixError.from_rpc(error).message
            _log.warning("using an incomplete profile", node=hello.node_id, profile=partial.profile_id, reason=reason)
            return partial

    async def _run(self, request: profiler_service_pb2.ProfileNodeRequest, node_id: str) -> profile_pb2.Profile:
        async for response in self._stub.ProfileNode(request, timeout=self._measure_timeout_s):
            if response.HasField("profile"):
                return response.profile
        raise LemixError(ErrorCode.INTERNAL, f"the profiler measured node {node_id} and sent no profile")

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


def _lacks_something(profile: profile_pb2.Profile) -> bool:
    """Whether a profile that was not measured to its end misses an operation on a stage."""
    if not profile.incomplete_reason:
        return False
    known = {(fit.stage, KIND_OF_PROTO[fit.op]) for fit in profile.fits if fit.chosen and fit.op in KIND_OF_PROTO}
    return any((stage, op) not in known for stage in range(profile.num_stages) for op in _NEEDED)
