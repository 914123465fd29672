"""Drives a node agent over the grid: tells how far it is, and turns the timings into a profile."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import grpc
import grpc.aio
import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import node_agent_service_pb2 as node_pb2
from lemix.internal.v1 import node_agent_service_pb2_grpc as node_grpc
from lemix.internal.v1 import profile_pb2, work_pb2
from lemix.internal.v1 import profiler_service_pb2 as profiler_pb2
from services.profiler.config import ProfilerSettings
from services.profiler.grid import grid_points, limits_of
from services.profiler.measured import Measured
from services.runtime.clock import Clock
from services.runtime.grpc_client import open_channel

if TYPE_CHECKING:
    from lemix.internal.v1.node_agent_service_pb2_grpc import NodeAgentServiceAsyncStub

_log = structlog.get_logger()


class Wish(NamedTuple):
    """What a caller wants measured; the node is at host:port."""

    address: str
    samples: Sequence[work_pb2.TrainingExample]
    budget_s: float
    allow_busy: bool = False


class _Silent(Exception):
    """The node says nothing any more."""

    def __init__(self, reason: LemixError) -> None:
        super().__init__(reason.message)
        self.reason = reason


class Aborted(NamedTuple):
    """A node that did not get to its end: the reason, and the profile of what it had measured (None: too little)."""

    error: LemixError
    profile: profile_pb2.Profile | None


async def profile_node(
    wish: Wish, settings: ProfilerSettings, clock: Clock
) -> AsyncGenerator[profiler_pb2.ProfileProgress | profile_pb2.Profile | Aborted, None]:
    """Measure a node and fit its latency models: progress, then the profile, which has no version yet, or Aborted.

    Raises LemixError: UNAVAILABLE (no such node), CONFLICT (it has work), INTERNAL (unusable timings).
    """
    async with open_channel(wish.address) as channel:
        stub: NodeAgentServiceAsyncStub = node_grpc.NodeAgentServiceStub(channel)
        info = await _node_info(stub, wish.address, settings.connect_timeout_s)
        points = grid_points(settings.grid, limits_of(info))
        rounds = min(settings.rounds, settings.repetitions)
        request = node_pb2.MeasureOpsRequest(
            points=points,
            rounds=rounds,
            repetitions=-(-settings.repetitions // rounds),
            warmup=settings.warmup,
            samples=wish.samples,
            budget_s=wish.budget_s,
            allow_busy=wish.allow_busy,
        )
        measured = Measured(info, points)
        progress = _Progress(request, clock)
        try:
            call = stub.MeasureOps(request)
            while (response := await _next(call, settings.measure_timeout_s)) is not None:
                measured.add(response)
                if response.HasField("point"):
                    yield progress.after(response.point)
        except (grpc.aio.AioRpcError, _Silent) as error:
            reason = error.reason if isinstance(error, _Silent) else LemixError.from_rpc(error)
            if measured.is_empty:
                raise reason from error
            yield await asyncio.to_thread(_aborted, measured, reason, clock)
            return
    # Fits take a while, in which calls for other nodes go on.
    profile = await asyncio.to_thread(measured.profile, wish.samples, now_unix_s=clock.unix_s())
    if profile.incomplete_reason:
        _log.warning("measurement ended early", node=info.node_id, reason=profile.incomplete_reason)
    yield profile


class _Progress:
    """How far a measurement is. The first round tells how long the others take."""

    def __init__(self, request: node_pb2.MeasureOpsRequest, clock: Clock) -> None:
        self._request = request
        self._clock = clock
        self._begin_s = clock.monotonic_s()
        self._done = 0

    def after(self, point: int) -> profiler_pb2.ProfileProgress:
        """The node has answered for this point."""
        self._done += 1
        total = len(self._request.points) * max(1, self._request.rounds)
        elapsed_s = self._clock.monotonic_s() - self._begin_s
        left_s = elapsed_s / self._done * (total - self._done)
        if self._request.budget_s:
            left_s = min(left_s, max(0.0, self._request.budget_s - elapsed_s))
        return profiler_pb2.ProfileProgress(
            points_done=self._done, points_total=total, op=self._request.points[point].op, seconds_left=left_s
        )


async def _next(
    call: "grpc.aio.UnaryStreamCall[node_pb2.MeasureOpsRequest, node_pb2.MeasureOpsResponse]", timeout_s: float
) -> node_pb2.MeasureOpsResponse | None:
    """The node's next message; None at its end. Raises AioRpcError, _Silent."""
    try:
        async with asyncio.timeout(timeout_s):
            response = await call.read()
    except TimeoutError as error:
        call.cancel()
        message = f"the node did not answer for {timeout_s:g} s while it was measured"
        raise _Silent(LemixError(ErrorCode.DEADLINE_EXCEEDED, message)) from error
    return response if isinstance(response, node_pb2.MeasureOpsResponse) else None


def _aborted(measured: Measured, reason: LemixError, clock: Clock) -> Aborted:
    """Keep what there is, if it can be used at all."""
    because = f"{reason.code.value}: {reason.message}"
    try:
        return Aborted(reason, measured.profile((), now_unix_s=clock.unix_s(), ended_because=because))
    except LemixError as error:
        _log.warning("nothing of an ended measurement can be kept", reason=error.message)
        return Aborted(reason, None)


async def _node_info(stub: "NodeAgentServiceAsyncStub", address: str, timeout_s: float) -> node_pb2.GetNodeInfoResponse:
    try:
        return await stub.GetNodeInfo(node_pb2.GetNodeInfoRequest(), timeout=timeout_s, wait_for_ready=True)
    except grpc.aio.AioRpcError as error:
        message = f"the node at {address} cannot be reached: {error.details()}"
        raise LemixError(ErrorCode.UNAVAILABLE, message) from error
