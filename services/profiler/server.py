"""gRPC handlers of the profiler."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc.aio
import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import profiler_service_pb2 as profiler_pb2
from lemix.internal.v1 import profiler_service_pb2_grpc as profiler_grpc
from services.profiler.config import ProfilerSettings
from services.profiler.measure import profile_node
from services.profiler.store import ProfileStore
from services.runtime.clock import Clock

_log = structlog.get_logger()

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class ProfilerServicer(profiler_grpc.ProfilerServiceServicer):
    """Measures nodes, one call per node at a time, and hands out stored profiles."""

    def __init__(self, settings: ProfilerSettings, store: ProfileStore, clock: Clock) -> None:
        self._settings = settings
        self._store = store
        self._clock = clock
        self._slots = asyncio.Semaphore(settings.concurrent_nodes)
        #: Calls that run or wait, by node; the lock serialises them.
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}
        self._saving = asyncio.Lock()

    async def ProfileNode(  # noqa: N802  the name of the RPC
        self, request: profiler_pb2.ProfileNodeRequest, context: Context
    ) -> profiler_pb2.ProfileNodeResponse:
        """Measure a node and store the result as a new version."""
        address = request.node_address
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise LemixError(ErrorCode.INVALID_REQUEST, "node_address must be host:port", param="node_address")
        async with self._alone(address), self._slots:
            started_s = self._clock.monotonic_s()
            profile = await profile_node(address, request.samples, self._settings, self._clock)
            async with self._saving:  # two nodes may have the same fingerprint, hence the same next version
                stored = await asyncio.to_thread(self._store.save, profile)
        _log.info(
            "profiled",
            node=stored.node_id,
            profile=stored.profile_id,
            seconds=round(self._clock.monotonic_s() - started_s, 2),
        )
        return profiler_pb2.ProfileNodeResponse(profile=stored)

    async def GetProfile(  # noqa: N802  the name of the RPC
        self, request: profiler_pb2.GetProfileRequest, context: Context
    ) -> profiler_pb2.GetProfileResponse:
        """Newest readable profile of a fingerprint."""
        try:
            profile = await asyncio.to_thread(self._store.newest, request.fingerprint)
        except ValueError as error:
            raise LemixError(ErrorCode.INVALID_REQUEST, str(error), param="fingerprint") from error
        if profile is None:
            raise LemixError(ErrorCode.NOT_FOUND, f"no profile of {request.fingerprint}")
        return profiler_pb2.GetProfileResponse(profile=profile)

    @asynccontextmanager
    async def _alone(self, address: str) -> AsyncIterator[None]:
        """Serialise calls for one node; refuse a call too many."""
        if sum(count for _, count in self._locks.values()) >= self._settings.max_calls:
            raise LemixError(ErrorCode.OVERLOADED, "too many profiling calls", retry_after_s=5.0)
        lock, count = self._locks.get(address, (asyncio.Lock(), 0))
        self._locks[address] = (lock, count + 1)
        try:
            async with lock:
                yield
        finally:
            lock, count = self._locks.pop(address)
            if count > 1:
                self._locks[address] = (lock, count - 1)
