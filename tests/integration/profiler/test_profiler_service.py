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
from services.profile_artifact import content_hash
from services.profiler.config import GridSettings, OpGrid, ProfilerSettings
from services.profiler.profiles.__main__ import main
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
            **{"connect_timeout_s": 5.0, "grid": GridSettings(prefill=SMALL, decode=SMALL, train=SMALL), **values},
        )
        server = GrpcServer(settings.listen)
        servicer = ProfilerServicer(settings, ProfileStore(tmp_path), FakeClock(unix_s=123.0))
        server.add(profiler_grpc.add_ProfilerServiceServicer_to_server, servicer, "lemix.internal.v1.ProfilerService")
        await server.start()
        channel = grpc.aio.insecure_channel(server.address)
        running.append((server, channel))
        stub = profiler_grpc.ProfilerServiceStub(channel)
        stub.address = server.address
        return stub

    yield start
    for server, channel in running:
        await channel.close()
        await server.stop(0)


async def answers(stub, address, **wishes):
    request = profiler_pb2.ProfileNodeRequest(node_address=address, **wishes)
    return [response async for response in stub.ProfileNode(request, timeout=20)]


async def profile(stub, address, **wishes):
    return (await answers(stub, address, **wishes))[-1].profile


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
    assert (request.repetitions, request.rounds, request.warmup) == (1, 2, 0)
    plain = [p for p in request.points if not (p.cached_tokens or p.decodes or p.num_bytes)]
    assert {point.length for point in plain} == {1, 16, 64, 127, 128}
    served = [p for p in plain if p.op in (profile_pb2.OP_KIND_PREFILL, profile_pb2.OP_KIND_DECODE)]
    assert max(point.batch for point in served) == 4


async def test_samples_give_loss_and_length_statistics(start, node):
    samples = [work_pb2.TrainingExample(token_ids=range(1, n + 1)) for n in (2, 4, 6)]
    result = await profile(await start(), node.address, samples=samples)
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


async def test_a_profile_says_where_it_comes_from_and_what_it_takes(start, node):
    result = await profile(await start(), node.address)
    assert (result.engine, result.device, result.dtype, result.threads_per_stage) == ("torch", "cpu test", "float32", 1)
    assert (result.source, result.incomplete_reason) == ("measured", "")
    assert result.content_hash == content_hash(result)
    memory = result.memory[1]
    assert (memory.stage, memory.weight_bytes, memory.kv_bytes_per_token) == (1, 5, 7)
    assert (memory.fixed_bytes, memory.activation_bytes_per_token) == (
        pytest.approx(1_000_000, rel=1e-3),
        pytest.approx(300, rel=1e-3),
    )
    assert {round(item.slowdown, 3) for item in result.interference} == {0.25}
    assert [round(link.offload_bytes_per_s / 1e9, 3) for link in result.host_links] == [1.0, 1.0]
    assert len(result.mixed) == 2


async def test_the_rounds_of_a_point_become_one_measurement(start, node):
    result = await profile(await start(), node.address)
    assert {len(item.durations_s) for item in result.measurements} == {2}


async def test_progress_comes_first_and_then_the_profile(start, node):
    *steps, last = await answers(await start(), node.address)
    assert last.HasField("profile")
    assert not any(step.HasField("profile") for step in steps)
    total = 2 * len(node.requests[0].points)
    assert [step.progress.points_done for step in steps] == list(range(1, total + 1))
    assert {step.progress.points_total for step in steps} == {total}
    assert steps[0].progress.op == profile_pb2.OP_KIND_PREFILL
    assert steps[-1].progress.seconds_left == 0.0


async def test_budget_and_permission_reach_the_node(start, node):
    await profile(await start(budget_s=50.0), node.address)
    await profile(await start(), node.address, budget_s=7.0, allow_busy=True)
    assert [(request.budget_s, request.allow_busy) for request in node.requests] == [(50.0, False), (7.0, True)]


async def test_what_a_dying_node_had_measured_is_kept_marked_and_not_preferred(start, node):
    stub = await start()
    complete = await profile(stub, node.address)
    node.answers_until = 30
    error = await error_of(profile(stub, node.address))
    assert error.code is ErrorCode.UNAVAILABLE
    assert "the stage worker died" in error.message
    assert "kept as f00d-2, incomplete" in error.message
    partial = (await stub.GetProfile(profiler_pb2.GetProfileRequest(profile_id="f00d-2"))).profile
    assert "the stage worker died" in partial.incomplete_reason
    assert "points were not measured" in partial.incomplete_reason
    assert await newest(stub, "f00d") == complete
    await stub.DeleteProfile(profiler_pb2.DeleteProfileRequest(profile_id="f00d-1"))
    assert await newest(stub, "f00d") == partial


async def test_a_node_that_dies_at_once_leaves_nothing(start, node):
    node.answers_until = 0
    stub = await start()
    assert (await error_of(profile(stub, node.address))).code is ErrorCode.UNAVAILABLE
    assert not (await stub.ListProfiles(profiler_pb2.ListProfilesRequest())).profiles


async def test_a_node_that_dies_before_anything_can_be_fitted_leaves_nothing(start, node):
    node.answers_until = 1
    stub = await start()
    error = await error_of(profile(stub, node.address))
    assert (error.code, error.message) == (ErrorCode.UNAVAILABLE, "the stage worker died")
    listed = await stub.ListProfiles(profiler_pb2.ListProfilesRequest())
    assert listed == profiler_pb2.ListProfilesResponse()


async def test_a_budget_too_small_to_fit_anything_is_told_and_leaves_nothing(start, node):
    node.budget_points = 1
    stub = await start()
    error = await error_of(profile(stub, node.address))
    assert error.code is ErrorCode.INTERNAL
    assert "no operation was timed at enough points to fit it; the budget was spent" in error.message
    listed = await stub.ListProfiles(profiler_pb2.ListProfilesRequest())
    assert listed == profiler_pb2.ListProfilesResponse()


async def test_points_that_do_not_fit_are_named(start, node):
    node.too_large = 300
    result = await profile(await start(), node.address)
    assert "points were not measured" in result.incomplete_reason
    assert "OutOfMemoryError: too large" in result.incomplete_reason
    assert max(item.batch * item.length for item in result.measurements if item.op == 1) <= 300


async def test_durations_that_are_no_numbers_are_refused_with_their_place(start, node):
    node.constant_s = float("nan")
    error = await error_of(profile(await start(), node.address))
    assert (error.code, "stage 0, OP_KIND_PREFILL, batch 1, length 16" in error.message) == (ErrorCode.INTERNAL, True)


@pytest.mark.parametrize(
    ("wishes", "param"),
    [
        ({"budget_s": -1.0}, "budget_s"),
        ({"budget_s": float("nan")}, "budget_s"),
        ({"allow_busy": True, "samples": [work_pb2.TrainingExample(token_ids=[1, 2])]}, "samples"),
    ],
)
async def test_wishes_that_cannot_be_granted_are_refused(start, node, wishes, param):
    error = await error_of(profile(await start(), node.address, **wishes))
    assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, param)
    assert node.requests == []


async def test_profiles_are_listed_newest_first_with_what_cannot_be_read(start, node, tmp_path):
    stub = await start()
    await profile(stub, node.address)
    await profile(stub, node.address)
    (tmp_path / "f00d" / "3.json").write_text("{")
    listed = await stub.ListProfiles(profiler_pb2.ListProfilesRequest())
    assert [summary.profile_id for summary in listed.profiles] == ["f00d-2", "f00d-1"]
    assert (listed.profiles[0].device, listed.profiles[0].mape < 0.01) == ("cpu test", True)
    assert len(listed.problems) == 1
    assert "3.json" in listed.problems[0]
    assert not (await stub.ListProfiles(profiler_pb2.ListProfilesRequest(fingerprint="other"))).profiles


async def test_a_changed_file_is_refused_by_name(start, node, tmp_path):
    stub = await start()
    await profile(stub, node.address)
    path = tmp_path / "f00d" / "1.json"
    path.write_text(path.read_text().replace('"node-0"', '"node-1"'))
    error = await error_of(stub.GetProfile(profiler_pb2.GetProfileRequest(profile_id="f00d-1")))
    assert error.code is ErrorCode.CONFLICT
    assert "1.json" in error.message
    assert "does not match content_hash" in error.message
    assert (await error_of(newest(stub, "f00d"))).code is ErrorCode.NOT_FOUND


async def test_two_profiles_are_compared_by_what_they_predict(start, node):
    stub = await start()
    await profile(stub, node.address)
    node.info.device = "cpu other"
    await profile(stub, node.address)
    same = await stub.DiffProfiles(profiler_pb2.DiffProfilesRequest(base_id="f00d-1", other_id="f00d-2"))
    assert list(same.notes) == ["device: 'cpu test' and 'cpu other'"]
    assert len(same.ops) == 2 * 6
    for op in same.ops:
        assert op.points
        assert (op.ratio_min, op.ratio_p50, op.ratio_max) == (1.0, 1.0, 1.0)
        assert op.base == op.other


@pytest.mark.parametrize("profile_id", ["f00d-7", "beef-1"])
async def test_what_is_not_there_cannot_be_got_compared_or_deleted(start, node, profile_id):
    stub = await start()
    await profile(stub, node.address)
    for call in (
        stub.GetProfile(profiler_pb2.GetProfileRequest(profile_id=profile_id)),
        stub.DiffProfiles(profiler_pb2.DiffProfilesRequest(base_id="f00d-1", other_id=profile_id)),
        stub.DeleteProfile(profiler_pb2.DeleteProfileRequest(profile_id=profile_id)),
    ):
        error = await error_of(call)
        assert (error.code, profile_id in error.message) == (ErrorCode.NOT_FOUND, True)


@pytest.mark.parametrize("profile_id", ["", "f00d", "../x-1", "f00d-0"])
async def test_what_is_no_id_is_refused(start, profile_id):
    stub = await start()
    error = await error_of(stub.DeleteProfile(profiler_pb2.DeleteProfileRequest(profile_id=profile_id)))
    assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, "profile_id")


async def test_a_profile_is_got_by_fingerprint_or_id_not_by_both(start):
    stub = await start()
    both = profiler_pb2.GetProfileRequest(fingerprint="f00d", profile_id="f00d-1")
    for request in (both, profiler_pb2.GetProfileRequest()):
        assert (await error_of(stub.GetProfile(request))).code is ErrorCode.INVALID_REQUEST


async def test_the_command_line_measures_lists_shows_compares_reports_and_deletes(start, node, tmp_path, capsys):
    stub = await start()
    samples, page = tmp_path / "samples.jsonl", tmp_path / "page.html"
    samples.write_text("[1, 2]\n[1, 2, 3, 4]\n")

    async def run(*arguments):
        code = await asyncio.to_thread(main, ["--address", stub.address, *arguments])
        return code, capsys.readouterr()

    code, told = await run("run", node.address, "--samples", str(samples))
    assert (code, "f00d-1" in told.out, "2 samples: loss 1.500" in told.out) == (0, True, True)
    assert "0 s left" in told.err
    assert (await run("run", node.address))[0] == 0
    code, told = await run("list")
    assert (code, [line.split()[0] for line in told.out.splitlines()]) == (0, ["profile", "f00d-2", "f00d-1"])
    assert "affine" in (await run("show", "f00d-1"))[1].out
    code, told = await run("diff", "f00d-1", "f00d-2")
    assert (code, told.out.count("1.000")) == (0, 3 * 12)
    assert (await run("report", "f00d-1", "--output", str(page)))[0] == 0
    assert "Sample examples" in page.read_text()
    assert (await run("delete", "f00d-1"))[1].out.endswith("deleted f00d-1\n")
    code, told = await run("show", "f00d-1")
    assert (code, told.err) == (1, "profiles: no profile f00d-1\n")


async def test_the_command_line_takes_profiles_larger_than_grpc_s_default(start, node, tmp_path, capsys):
    stub = await start()
    large = await profile(stub, node.address)
    large.measurements[0].durations_s.extend([0.5] * 600_000)
    ProfileStore(tmp_path).save(large)
    code = await asyncio.to_thread(main, ["--address", stub.address, "show", "f00d-2"])
    assert (code, capsys.readouterr().err) == (0, "")
