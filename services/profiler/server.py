"""gRPC handlers of the profiler."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeAlias, TypeVar

import grpc.aio
import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import profile_pb2
from lemix.internal.v1 import profiler_service_pb2 as profiler_pb2
from lemix.internal.v1 import profiler_service_pb2_grpc as profiler_grpc
from services.profiler.compare import compare
from services.profiler.config import ProfilerSettings
from services.profiler.measure import Aborted, Wish, profile_node
from services.profiler.store import CorruptProfile, ProfileStore
from services.runtime.clock import Clock

_log = structlog.get_logger()

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
_T = TypeVar("_T")

_MAX_BUDGET_S = 86_400.0


class ProfilerServicer(profiler_grpc.ProfilerServiceServicer):
    """Measures nodes, one call per node at a time, and hands out stored profiles."""

    def __init__(self, settings: ProfilerSettings, store: ProfileStore, clock: Clock) -> None:
        self._settings = settings
        self._store = store
        self._clock = clock
        self._slots = asyncio.Semaphore(settings.concurrent_nodes)
        #: Calls that run or wait, by node; the lock serialises them.
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    async def ProfileNode(  # noqa: N802  the name of the RPC
        self, request: profiler_pb2.ProfileNodeRequest, context: Context
    ) -> AsyncIterator[profiler_pb2.ProfileNodeResponse]:
        """Measure a node and store the result as a new version."""
        wish = self._wish(request)
        async with self._alone(wish.address), self._slots:
            started_s = self._clock.monotonic_s()
            stored: profile_pb2.Profile | None = None
            async with aclosing(profile_node(wish, self._settings, self._clock)) as steps:
                async for step in steps:
                    if isinstance(step, profiler_pb2.ProfileProgress):
                        yield profiler_pb2.ProfileNodeResponse(progress=step)
                    elif isinstance(step, Aborted):
                        raise await self._keep(step)
                    else:
                        stored = await asyncio.to_thread(self._store.save, step)
        if stored is None:
            raise LemixError(ErrorCode.INTERNAL, "the measurement ended without a profile")
        seconds = round(self._clock.monotonic_s() - started_s, 2)
        _log.info("profiled", node=stored.node_id, profile=stored.profile_id, seconds=seconds)
        yield profiler_pb2.ProfileNodeResponse(profile=stored)

    async def GetProfile(  # noqa: N802  the name of the RPC
        self, request: profiler_pb2.GetProfileRequest, context: Context
    ) -> profiler_pb2.GetProfileResponse:
        """Newest readable profile of a fingerprint, or the one of an id."""
        if bool(request.fingerprint) == bool(request.profile_id):
            raise LemixError(ErrorCode.INVALID_REQUEST, "name a fingerprint or a profile_id", param="fingerprint")
        if request.profile_id:
            return profiler_pb2.GetProfileResponse(profile=await self._get(request.profile_id, "profile_id"))
        newest = await _valid("fingerprint", lambda: asyncio.to_thread(self._store.newest, request.fingerprint))
        if newest is None:
            raise LemixError(ErrorCode.NOT_FOUND, f"no profile of {request.fingerprint}")
        return profiler_pb2.GetProfileResponse(profile=newest)

    async def ListProfiles(  # noqa: N802  the name of the RPC
        self, request: profiler_pb2.ListProfilesRequest, context: Context
    ) -> profiler_pb2.ListProfilesResponse:
        """Every readable profile in short."""
        profiles, problems = await _valid(
            "fingerprint", lambda: asyncio.to_thread(self._store.all, request.fingerprint)
        )
        return profiler_pb2.ListProfilesResponse(profiles=map(_summary, profiles), problems=problems)

    async def DiffProfiles(  # noqa: N802  the name of the RPC
        self, request: profiler_pb2.DiffProfilesRequest, context: Context
    ) -> profiler_pb2.DiffProfilesResponse:
        """What two profiles predict differently."""
        base = await self._get(request.base_id, "base_id")
        other = await self._get(request.other_id, "other_id")
        try:
            return compare(base, other)
        except ValueError as error:
            raise LemixError(ErrorCode.CONFLICT, str(error)) from error

    async def DeleteProfile(  # noqa: N802  the name of the RPC
        self, request: profiler_pb2.DeleteProfileRequest, context: Context
    ) -> profiler_pb2.DeleteProfileResponse:
        """Delete a profile for ever."""
        deleted = await _valid("profile_id", lambda: asyncio.to_thread(self._store.delete, request.profile_id))
        if not deleted:
            raise LemixError(ErrorCode.NOT_FOUND, f"no profile {request.profile_id}", param="profile_id")
        _log.info("profile deleted", profile=request.profile_id)
        return profiler_pb2.DeleteProfileResponse()

    # ------------------------------------------------------------- measuring

    def _wish(self, request: profiler_pb2.ProfileNodeRequest) -> Wish:
        host, _, port = request.node_address.rpartition(":")
        if not host or not port.isdigit():
            raise LemixError(ErrorCode.INVALID_REQUEST, "node_address must be host:port", param="node_address")
        if not (math.isfinite(request.budget_s) and 0.0 <= request.budget_s <= _MAX_BUDGET_S):
            message = f"budget_s must be 0 (as the profiler is set) to {_MAX_BUDGET_S:g}"
            raise LemixError(ErrorCode.INVALID_REQUEST, message, param="budget_s")
        if request.samples and request.allow_busy:
            message = "samples need a node without work: leave out samples or allow_busy"
            raise LemixError(ErrorCode.INVALID_REQUEST, message, param="samples")
        budget_s = request.budget_s or self._settings.budget_s
        return Wish(request.node_address, request.samples, budget_s, request.allow_busy)

    async def _keep(self, aborted: Aborted) -> LemixError:
        """Store what was measured until the node's end; returns the error to answer with."""
        error = aborted.error
        if aborted.profile is None:
            return error
        stored = await asyncio.to_thread(self._store.save, aborted.profile)
        _log.warning("incomplete profile kept", profile=stored.profile_id, reason=stored.incomplete_reason)
        return LemixError(error.code, f"{error.message}; what was measured is kept as {stored.profile_id}, incomplete")

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

    # ------------------------------------------------------------- stored profiles

    async def _get(self, profile_id: str, param: str) -> profile_pb2.Profile:
        try:
            profile = await _valid(param, lambda: asyncio.to_thread(self._store.get, profile_id))
        except CorruptProfile as error:
            raise LemixError(ErrorCode.CONFLICT, str(error), param=param) from error
        if profile is None:
            raise LemixError(ErrorCode.NOT_FOUND, f"no profile {profile_id}", param=param)
        return profile


async def _valid(param: str, work: Callable[[], Awaitable[_T]]) -> _T:
    """Raises LemixError INVALID_REQUEST for what is no fingerprint and no id, CorruptProfile."""
    try:
        return await work()
    except CorruptProfile:
        raise
    except ValueError as error:
        raise LemixError(ErrorCode.INVALID_REQUEST, str(error), param=param) from error


def _summary(profile: profile_pb2.Profile) -> profiler_pb2.ProfileSummary:
    errors = [fit.mape for fit in profile.fits if fit.chosen]
    return profiler_pb2.ProfileSummary(
        profile_id=profile.profile_id,
        node_id=profile.node_id,
        model=profile.model,
        num_stages=profile.num_stages,
        engine=profile.engine,
        device=profile.device,
        dtype=profile.dtype,
        created_unix_s=profile.created_unix_s,
        incomplete_reason=profile.incomplete_reason,
        source=profile.source,
        content_hash=profile.content_hash,
        mape=sum(errors) / len(errors) if errors else 0.0,
    )
