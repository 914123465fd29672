"""The profiler service against a fake node agent, both over loopback gRPC."""

import asyncio

import grpc.aio
import pytest
from fake_node_agent import FakeNodeAgent, serve_fake

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import profile_pb2, work_pb2
from lemix.internal.v1 import profiler_service_pb2 as profiler_pb2
from lemix.internal.v1 import profiler_service_pb2_grpc as profiler_grpc
from services.latency import LatencyModel
from services.profiler.config import GridSettings, OpGrid, ProfilerSettings
from services.profiler.server import ProfilerServicer
from services.profiler.store import ProfileStore
from services.runtime.clock import FakeClock
from services.runtime.grpc_server import GrpcServer

SMALL = OpGrid(batches=(1, 4, 16), lengths=(16, 64, 4096))


@pytest.fixture
async def node():
    agent = FakeNodeAgent()
    server = await serve_fake(agent)
    agent.address = server.address
    yield agent
    await server.stop(0)


@pytest.fixture
async def start(tmp_path):
    """Start a profiler with some settings; returns a stub of it."""
    running = []

    async def start(**values):
        settings = ProfilerSettings(
            listen="127.0.0.1:0",
            directory=str(tmp_path),
            repetitions=2,
            warmup=0,
            grid=GridSettings(prefill=SMALL, decode=SMALL, train=SMALL),
            **{"connect_timeout_s": 5.0, **values},
        )
        server = GrpcServer(settings.listen)
        servicer = ProfilerServicer(settings, ProfileStore(tmp_path), FakeClock(unix_s=123.0))
        server.add(profiler_grpc.add_ProfilerServiceServicer_to_server, servicer, "lemix.internal.v1.ProfilerService")
        await server.start()
        channel = grpc.aio.insecure_channel(server.address)
        running.append((server, channel))
        return profiler_grpc.ProfilerServiceStub(channel)

    yield start
    for server, channel in running:
        await channel.close()
        await server.stop(0)


async def profile(stub, address, samples=()):
    request = profiler_pb2.ProfileNodeRequest(node_address=address, samples=samples)
    return (await stub.ProfileNode(request, timeout=20)).profile


async def newest(stub, fingerprint):
    return (await stub.GetProfile(profiler_pb2.GetProfileRequest(fingerprint=fingerprint), timeout=5)).profile


async def error_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return LemixError.from_rpc(raised.value)


async def test_a_node_is_measured_fitted_and_kept(start, node):
    stub = await start()
    result = await profile(stub, node.address)
    assert (result.profile_id, result.version, result.node_id, result.model) == ("f00d-1", 1, "node-0", "tiny")
    assert (result.num_stages, result.created_unix_s, list(result.peak_memory_bytes)) == (2, 123.0, [1000, 2000])
    assert not result.HasField("loss")
    chosen = {(fit.stage, fit.op): fit for fit in result.fits if fit.chosen}
    assert len(chosen) == 2 * 6
    prefill = chosen[1, profile_pb2.OP_KIND_PREFILL]
    model = LatencyModel(prefill.model, tuple(prefill.coefficients))
    assert model.predict_s(3, 100) == pytest.approx(2 * (1e-3 + 1e-5 * 300), rel=1e-3)
    assert await newest(stub, "f00d") == result


async def test_the_grid_is_cut_to_the_node(start, node):
    await profile(await start(), node.address)
    (request,) = node.requests
    assert (request.repetitions, request.warmup) == (2, 0)
    assert {point.length for point in request.points} == {1, 16, 64, 127, 128}
    served = [p for p in request.points if p.op in (profile_pb2.OP_KIND_PREFILL, profile_pb2.OP_KIND_DECODE)]
    assert max(point.batch for point in served) == 4


async def test_samples_give_loss_and_length_statistics(start, node):
    samples = [work_pb2.TrainingExample(token_ids=range(1, n + 1)) for n in (2, 4, 6)]
    result = await profile(await start(), node.address, samples)
    assert (result.length.count, result.length.mean, result.length.p50) == (3, 4.0, 4.0)
    assert (result.loss.count, result.loss.mean) == (3, 2.0)


async def test_measuring_again_makes_the_next_version(start, node):
    stub = await start()
    await profile(stub, node.address)
    assert (await profile(stub, node.address)).version == 2
    assert (await newest(stub, "f00d")).version == 2


async def test_calls_for_one_node_are_serialised(start, node):
    stub = await start(concurrent_nodes=8)
    node.gate.clear()
    calls = [asyncio.create_task(profile(stub, node.address)) for _ in range(3)]
    await asyncio.wait_for(node.entered.wait(), 5)
    node.gate.set()
    versions = sorted(result.version for result in await asyncio.gather(*calls))
    assert versions == [1, 2, 3]
    assert node.most_running == 1


async def test_a_call_too_many_is_refused_and_the_rest_goes_on(start, node):
    stub = await start(max_calls=1)
    node.gate.clear()
    first = asyncio.create_task(profile(stub, node.address))
    await asyncio.wait_for(node.entered.wait(), 5)
    error = await error_of(profile(stub, node.address))
    assert error.code is ErrorCode.OVERLOADED
    assert error.retry_after_s
    node.gate.set()
    assert (await first).version == 1
    assert (await profile(stub, node.address)).version == 2


async def test_a_cancelled_call_frees_its_place(start, node):
    stub = await start(max_calls=1)
    node.gate.clear()
    first = asyncio.create_task(profile(stub, node.address))
    await asyncio.wait_for(node.entered.wait(), 5)
    first.cancel()
    await asyncio.wait_for(node.left.wait(), 5)  # the cancellation went through the profiler to the node
    node.gate.set()
    assert (await profile(stub, node.address)).version == 1


async def test_a_busy_node_is_a_conflict(start, node):
    node.busy = True
    error = await error_of(profile(await start(), node.address))
    assert (error.code, error.message) == (ErrorCode.CONFLICT, "the node has work")


async def test_a_node_that_hangs_hits_the_deadline(start, node):
    node.gate.clear()
    error = await error_of(profile(await start(measure_timeout_s=0.2), node.address))
    assert error.code is ErrorCode.DEADLINE_EXCEEDED


async def test_an_unreachable_node_is_unavailable_and_named(start):
    error = await error_of(profile(await start(connect_timeout_s=0.3), "127.0.0.1:1"))
    assert error.code is ErrorCode.UNAVAILABLE
    assert "127.0.0.1:1" in error.message


async def test_a_stage_that_was_not_timed_is_reported(start, node):
    node.silent_stage = 1
    error = await error_of(profile(await start(), node.address))
    assert error.code is ErrorCode.INTERNAL
    assert "OP_KIND_PREFILL" in error.message


async def test_timings_nothing_can_be_fitted_to_are_reported_and_not_stored(start, node):
    node.constant_s = -1.0
    stub = await start()
    error = await error_of(profile(stub, node.address))
    assert "not a positive number" in error.message
    assert (await error_of(newest(stub, "f00d"))).code is ErrorCode.NOT_FOUND


@pytest.mark.parametrize("address", ["", "nowhere", ":50061", "host:port"])
async def test_a_bad_address_is_refused(start, address):
    error = await error_of(profile(await start(), address))
    assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, "node_address")


async def test_a_fingerprint_that_is_none_is_refused(start):
    error = await error_of(newest(await start(), "../etc"))
    assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, "fingerprint")


async def test_a_damaged_newest_version_falls_back(start, node, tmp_path):
    stub = await start()
    first = await profile(stub, node.address)
    await profile(stub, node.address)
    (tmp_path / "f00d" / "2.json").write_text("{")
    assert await newest(stub, "f00d") == first
