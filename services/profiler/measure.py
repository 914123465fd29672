"""Drives a node agent over the grid and turns its timings into a profile."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import node_agent_service_pb2 as node_pb2
from lemix.internal.v1 import node_agent_service_pb2_grpc as node_grpc
from lemix.internal.v1 import profile_pb2, work_pb2
from services.profiler.config import ProfilerSettings
from services.profiler.fit import FitError
from services.profiler.fit_profile import fit_profile
from services.profiler.grid import grid_points
from services.profiler.statistics import distribution
from services.runtime.clock import Clock
from services.runtime.grpc_client import open_channel

if TYPE_CHECKING:
    from lemix.internal.v1.node_agent_service_pb2_grpc import NodeAgentServiceAsyncStub


async def profile_node(
    address: str, samples: Sequence[work_pb2.TrainingExample], settings: ProfilerSettings, clock: Clock
) -> profile_pb2.Profile:
    """Measure the node at host:port and fit its latency models; the result has no version yet.

    Raises LemixError: UNAVAILABLE (node), DEADLINE_EXCEEDED, CONFLICT (node has work), INTERNAL (unusable timings).
    """
    async with open_channel(address) as channel:
        stub: NodeAgentServiceAsyncStub = node_grpc.NodeAgentServiceStub(channel)
        try:
            info = await stub.GetNodeInfo(
                node_pb2.GetNodeInfoRequest(), timeout=settings.connect_timeout_s, wait_for_ready=True
            )
        except grpc.aio.AioRpcError as error:
            message = f"the node at {address} cannot be reached: {error.details()}"
            raise LemixError(ErrorCode.UNAVAILABLE, message) from error
        try:
            measured = await _measure(stub, info, samples, settings)
        except grpc.aio.AioRpcError as error:
            raise LemixError.from_rpc(error) from error
    _check_complete(address, info, measured, len(samples))
    return _profile(info, measured, samples, clock)


async def _measure(
    stub: "NodeAgentServiceAsyncStub",
    info: node_pb2.GetNodeInfoResponse,
    samples: Sequence[work_pb2.TrainingExample],
    settings: ProfilerSettings,
) -> node_pb2.MeasureOpsResponse:
    """All results of the grid in one message."""
    request = node_pb2.MeasureOpsRequest(
        points=grid_points(settings.grid, max_batch=info.max_batch, max_context_tokens=info.max_context_tokens),
        repetitions=settings.repetitions,
        warmup=settings.warmup,
        samples=samples,
    )
    everything = node_pb2.MeasureOpsResponse()
    async for response in stub.MeasureOps(request, timeout=settings.measure_timeout_s):
        everything.MergeFrom(response)
    return everything


def _check_complete(
    address: str, info: node_pb2.GetNodeInfoResponse, measured: node_pb2.MeasureOpsResponse, num_samples: int
) -> None:
    expected = set(range(info.num_stages))
    seen: dict[int, set[int]] = {}
    for item in measured.measurements:
        seen.setdefault(item.op, set()).add(item.stage)
    incomplete = [profile_pb2.OpKind.Name(op) for op, stages in seen.items() if stages != expected]
    if not seen or incomplete:
        what = ", ".join(incomplete) or "any operation"
        raise LemixError(ErrorCode.INTERNAL, f"the node at {address} did not time {what} on all its stages")
    if len(measured.sample_losses) != num_samples:
        message = f"the node at {address} returned {len(measured.sample_losses)} losses for {num_samples} samples"
        raise LemixError(ErrorCode.INTERNAL, message)


def _profile(
    info: node_pb2.GetNodeInfoResponse,
    measured: node_pb2.MeasureOpsResponse,
    samples: Sequence[work_pb2.TrainingExample],
    clock: Clock,
) -> profile_pb2.Profile:
    profile = profile_pb2.Profile(
        fingerprint=info.profile_fingerprint,
        node_id=info.node_id,
        created_unix_s=clock.unix_s(),
        num_stages=info.num_stages,
        model=info.model,
        measurements=measured.measurements,
        peak_memory_bytes=measured.peak_memory_bytes,
    )
    try:
        fit_profile(profile)
    except FitError as error:
        raise LemixError(ErrorCode.INTERNAL, f"the timings of node {info.node_id} are unusable: {error}") from error
    if samples:
        profile.loss.CopyFrom(distribution(measured.sample_losses))
        profile.length.CopyFrom(distribution([len(sample.token_ids) for sample in samples]))
    return profile
