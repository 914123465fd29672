"""The way of a request through a real scheduler, with fake peers on real gRPC."""

import asyncio
import contextlib
import time

import grpc
import pytest

from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.internal.v1 import work_pb2
from lemix.v1 import errors_pb2, types_pb2
from services.ledger import Ledger, TaskRecord, TaskState
from tests.integration.scheduler.cluster import Cluster, eventually
from tests.integration.scheduler.fakes import WAIT_S, FakeNode, StuckProfiler, work


async def test_the_full_way_of_a_request(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    node, gateway = await cluster.node(scheduler), await cluster.gateway(scheduler)
    await gateway.submit("r")
    await gateway.news("r", "accepted")
    assigned = await gateway.news("r", "assigned")
    assert (assigned.node_id, assigned.node_address) == ("n0", node.address)
    delivery = await node.take()
    assert delivery.item.task_id == "r"
    assert delivery.item.fencing_token == node.welcome.fencing_token > 0
    assert await node.finish(delivery, tokens=(7, 8))
    finished = await gateway.news("r", "finished")
    assert list(finished.token_ids) == [7, 8]
    await eventually(lambda: _is_empty(gateway))


async def _is_empty(gateway) -> bool:  # type: ignore[no-untyped-def]
    status = (await gateway.stub.GetClusterState(pb.GetClusterStateRequest())).status
    return status.waiting_inference == 0 and all(node.inflight_inference == 0 for node in status.nodes)


async def test_a_repeated_submit_is_answered_from_the_ledger(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    node, first = await cluster.node(scheduler), await cluster.gateway(scheduler, "g0")
    await first.submit("r")
    await first.news("r", "assigned")
    second = await cluster.gateway(scheduler, "g1")
    await second.submit("r")
    await second.news("r", "accepted")
    await second.news("r", "assigned")
    await node.finish(await node.take(), tokens=(9,))
    assert list((await second.news("r", "finished")).token_ids) == [9]  # who asked last
    await first.submit("r")
    assert list((await first.news("r", "finished")).token_ids) == [9]
    assert await node._ledger.read_node("n0", count=1, block_s=0) == []


@pytest.mark.parametrize(("age_s", "fate"), [(1.0, "assigned"), (100.0, "rejected"), (None, "rejected")])
async def test_freshness_is_judged_by_what_the_node_tells(cluster: Cluster, age_s: float | None, fate: str) -> None:
    scheduler = await cluster.scheduler()
    gateway = await cluster.gateway(scheduler)
    node = await cluster.node(scheduler, beats=False)
    await gateway.submit("r", work(max_staleness_s=60.0))
    await gateway.news("r", "accepted")
    node.weights_age_s = age_s
    await node.beat()
    news = await gateway.news("r", fate)
    if fate == "rejected":
        assert news.code == errors_pb2.ERROR_CODE_STALE_WEIGHTS
        assert news.retry_after_s > 0
        assert await (await cluster.ledger()).record("r") is None, "the same id may come again"
    else:
        assert (await node.take()).item.inference.max_staleness_s == 60.0


async def test_requests_wait_for_the_first_node(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    gateway = await cluster.gateway(scheduler)
    await gateway.submit("r")
    await gateway.news("r", "accepted")
    state = (await gateway.stub.GetClusterState(pb.GetClusterStateRequest())).status
    assert not state.ready
    assert state.not_ready_reason == "no node has joined"
    await cluster.node(scheduler)
    await gateway.news("r", "assigned")
    state = (await gateway.stub.GetClusterState(pb.GetClusterStateRequest())).status
    assert state.ready
    assert [(node.node_id, node.inflight_inference) for node in state.nodes] == [("n0", 1)]


async def test_a_waiting_request_is_cancelled_for_good(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    gateway = await cluster.gateway(scheduler)
    await gateway.submit("r")
    await gateway.cancel("r")
    finished = await gateway.news("r", "finished")
    assert finished.finish_reason == types_pb2.FINISH_REASON_CANCELLED
    assert finished.error.code == errors_pb2.ERROR_CODE_CANCELLED
    record = await (await cluster.ledger()).record("r")
    assert record is not None
    assert record.state is TaskState.DONE


async def test_a_running_request_is_cancelled_on_its_node(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    node, gateway = await cluster.node(scheduler), await cluster.gateway(scheduler)
    await gateway.submit("r")
    await gateway.news("r", "assigned")
    await gateway.cancel("r")
    assert (await node.command()).cancel.task_id == "r"


@pytest.mark.parametrize("end", ["stream", "lease"])
async def test_work_of_a_lost_node_goes_to_another(cluster: Cluster, end: str) -> None:
    scheduler = await cluster.scheduler(node_lease_s=2.0 if end == "stream" else 0.3)
    lost, gateway = await cluster.node(scheduler, "n0", beats=end == "stream"), await cluster.gateway(scheduler)
    await gateway.submit("r")
    assert (await gateway.news("r", "assigned")).node_id == "n0"
    held = await lost.take()
    other = await cluster.node(scheduler, "n1")
    if end == "stream":
        await lost.vanish()
    else:
        assert await lost.ended() is grpc.StatusCode.UNAVAILABLE
    assert (await gateway.news("r", "assigned")).node_id == "n1"
    assert not await lost.finish(held, report=False)
    await other.finish(await other.take(), tokens=(4,))
    assert list((await gateway.news("r", "finished")).token_ids) == [4]


async def test_a_draining_node_gets_no_more_work(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    leaving, gateway = await cluster.node(scheduler, "n0"), await cluster.gateway(scheduler)
    await gateway.submit("r0")
    assert (await gateway.news("r0", "assigned")).node_id == "n0"
    leaving.draining = True

    async def is_out() -> bool:
        status = (await gateway.stub.GetClusterState(pb.GetClusterStateRequest())).status
        return [node.role for node in status.nodes] == ["unused"]

    await eventually(is_out)
    await gateway.submit("r1")
    await gateway.news("r1", "accepted")
    await cluster.node(scheduler, "n1")
    assert (await gateway.news("r1", "assigned")).node_id == "n1"
    await leaving.finish(await leaving.take(), tokens=(9,))
    assert list((await gateway.news("r0", "finished")).token_ids) == [9]


async def test_a_result_that_its_lost_node_could_not_report_is_told(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    lost, gateway = await cluster.node(scheduler, "n0"), await cluster.gateway(scheduler)
    await gateway.submit("r")
    assert await lost.finish(await lost.take(), tokens=(3,), report=False)
    await lost.vanish()
    await cluster.node(scheduler, "n1")
    assert list((await gateway.news("r", "finished")).token_ids) == [3]


async def test_a_node_that_connects_again_keeps_its_work(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    node, gateway = await cluster.node(scheduler), await cluster.gateway(scheduler)
    await gateway.submit("r")
    await gateway.news("r", "assigned")
    delivery = await node.take()
    again = await cluster.node(scheduler)
    assert await node.ended() is grpc.StatusCode.ABORTED or await node.ended() is grpc.StatusCode.FAILED_PRECONDITION
    assert (await gateway.news("r", "assigned")).node_id == "n0"
    assert await again.finish(delivery)
    await gateway.news("r", "finished")


async def test_a_restarted_scheduler_goes_on_with_accepted_work(cluster: Cluster) -> None:
    first = await cluster.scheduler()
    node, gateway = await cluster.node(first, "n0", max_inflight_inference=1), await cluster.gateway(first)
    for request_id in ("held", "waiting"):
        await gateway.submit(request_id)
        await gateway.news(request_id, "accepted")
    await gateway.news("held", "assigned")
    delivery = await node.take()
    await gateway.disconnect()
    await node.vanish()
    await cluster.stop(first)
    ledger = await cluster.ledger()
    assert await ledger.record("waiting") == TaskRecord(TaskState.WAITING)

    second = await cluster.scheduler()
    node, gateway = await cluster.node(second, "n0", max_inflight_inference=1), await cluster.gateway(second)
    for request_id in ("held", "waiting"):
        await gateway.submit(request_id)
        await gateway.news(request_id, "accepted")
    assert (await gateway.news("held", "assigned")).node_address == node.address
    assert await node.finish(delivery)
    await gateway.news("held", "finished")
    await gateway.news("waiting", "assigned")
    assert (await node.take()).item.fencing_token == node.welcome.fencing_token


async def test_work_of_a_node_that_does_not_come_back_after_a_restart_moves(cluster: Cluster) -> None:
    first = await cluster.scheduler()
    node, gateway = await cluster.node(first, "n0"), await cluster.gateway(first)
    await gateway.submit("r")
    await gateway.news("r", "assigned")
    await gateway.disconnect()
    await cluster.stop(first)
    await node.vanish()

    second = await cluster.scheduler(node_lease_s=0.2)
    await cluster.node(second, "n1")
    gateway = await cluster.gateway(second)
    await gateway.submit("r")
    assert (await gateway.news("r", "assigned")).node_id == "n1"


async def test_an_older_scheduler_stops_when_a_newer_one_leads(cluster: Cluster) -> None:
    old = await cluster.scheduler()
    await cluster.node(old)
    gateway = await cluster.gateway(old)
    running = asyncio.create_task(old.run_until(asyncio.Event()))
    await cluster.scheduler()
    await gateway.submit("r")
    with pytest.raises(Exception, match="too old"):
        await asyncio.wait_for(running, 5.0)


async def test_a_request_that_a_deposed_scheduler_took_from_the_ledger_still_runs(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler(node_lease_s=0.2)
    node, deposed = await cluster.node(scheduler), await cluster.ledger()
    await deposed.submit(work_pb2.WorkItem(task_id="a", inference=work()))
    (taken,) = await deposed.read_global(count=1, block_s=0)  # in one step of the loop: nobody else read it
    assert taken.item.task_id == "a"
    assert (await node.take()).item.task_id == "a"


async def test_work_of_a_node_that_fails_to_join_again_after_a_restart_moves(cluster: Cluster) -> None:
    before = await cluster.scheduler()
    node, gateway = await cluster.node(before, "n0"), await cluster.gateway(before)
    await gateway.submit("a")
    await gateway.news("a", "assigned")
    await cluster.stop(before)
    await node.vanish()
    async with contextlib.AsyncExitStack() as stack:
        profiler = await StuckProfiler.start(stack)
        lease_s = 0.1
        after = await cluster.scheduler(node_lease_s=lease_s, profile_path="", profiler_address=profiler.address)
        ledger = await cluster.ledger()
        joining = FakeNode(after.address, ledger, "n0")
        stack.push_async_callback(joining.close)
        refused = asyncio.create_task(joining.is_refused())
        await asyncio.wait_for(profiler.asked.wait(), WAIT_S)
        await asyncio.sleep(4 * lease_s)  # past the wait for nodes of the predecessor: this one is still measured
        assert [item.task_id for item in await ledger.unfinished("n0")] == ["a"]
        profiler.fail.set()
        assert await refused
        await eventually(lambda: _is_free(ledger, "n0"))


async def _is_free(ledger: Ledger, node_id: str) -> bool:
    return not await ledger.unfinished(node_id)


async def test_an_overdue_request_is_not_given_to_a_node(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    gateway = await cluster.gateway(scheduler)
    await gateway.submit("r", work(deadline_unix_s=time.time() - 1.0))
    finished = await gateway.news("r", "finished")
    assert finished.error.code == errors_pb2.ERROR_CODE_DEADLINE_EXCEEDED


async def test_a_full_queue_rejects_and_the_same_id_may_come_again(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler(core={"policy": "round_robin", "max_waiting_inference": 1})
    gateway = await cluster.gateway(scheduler)
    await gateway.submit("a")
    await gateway.news("a", "accepted")
    await eventually(lambda: _has_waiting(gateway, 1))
    await gateway.submit("b")
    rejected = await gateway.news("b", "rejected")
    assert rejected.code == errors_pb2.ERROR_CODE_OVERLOADED
    assert rejected.retry_after_s > 0
    await cluster.node(scheduler)
    await gateway.news("a", "assigned")
    await gateway.submit("b")
    await gateway.news("b", "assigned")


async def _has_waiting(gateway, count: int) -> bool:  # type: ignore[no-untyped-def]
    status = (await gateway.stub.GetClusterState(pb.GetClusterStateRequest())).status
    return bool(status.waiting_inference == count)


@pytest.mark.parametrize(
    ("request_id", "spoil", "param"),
    [
        ("x" * 133, lambda _: None, "request_id"),
        ("r", lambda request: request.ClearField("prompt_token_ids"), "prompt"),
        ("r", lambda request: request.sampling.ClearField("max_tokens"), "max_tokens"),
    ],
)
async def test_a_bad_request_is_refused_by_name(cluster: Cluster, request_id, spoil, param) -> None:  # type: ignore[no-untyped-def]
    gateway = await cluster.gateway(await cluster.scheduler())
    request = work()
    spoil(request)
    await gateway.submit(request_id, request)
    rejected = await gateway.news(request_id, "rejected")
    assert (rejected.code, rejected.param) == (errors_pb2.ERROR_CODE_INVALID_REQUEST, param)


async def test_a_session_must_begin_with_a_hello(cluster: Cluster) -> None:
    gateway = await cluster.gateway(await cluster.scheduler())
    for call, request in (
        (gateway.stub.GatewaySession(), pb.GatewaySessionRequest(cancel=pb.CancelInference(request_id="r"))),
        (gateway.stub.NodeSession(), pb.NodeSessionRequest(heartbeat=pb.NodeHeartbeat())),
    ):
        await call.write(request)
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_node_with_other_stages_than_its_profile_is_refused(cluster: Cluster) -> None:
    gateway = await cluster.gateway(await cluster.scheduler())
    call = gateway.stub.NodeSession()
    await call.write(pb.NodeSessionRequest(hello=pb.NodeHello(node_id="n", address="a:1", num_stages=3)))
    assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "3 stages" in await call.details()


async def test_a_synchronisation_passes_through_two_phases(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler(core={"policy": "round_robin", "sync_every_steps": 1})
    nodes = [await cluster.node(scheduler, name) for name in ("n0", "n1")]
    step = pb.OpTrace(stage=0, op=5, begin_monotonic_s=time.monotonic(), duration_s=0.001)
    await nodes[0].send(pb.NodeSessionRequest(traces=pb.TraceBatch(ops=[step])))
    snapshots = [(await node.command()).take_snapshot for node in nodes]
    sync_id = snapshots[0].sync_id
    assert [snapshot.sync_id for snapshot in snapshots] == [sync_id, sync_id]
    for node in nodes:
        await node.send(pb.NodeSessionRequest(sync_finished=pb.SyncFinished(sync_id=sync_id, snapshot_only=True)))
    applied = [(await node.command()).apply_weights for node in nodes]
    assert [list(command.source_addresses) for command in applied] == [[nodes[1].address], [nodes[0].address]]
    assert applied[0].mode == pb.SYNC_MODE_AVERAGE
    for node in nodes:
        finished = pb.SyncFinished(sync_id=sync_id, weight_step=4)
        await node.send(pb.NodeSessionRequest(sync_finished=finished))

    async def has_stepped() -> bool:
        status = (await gateway.stub.GetClusterState(pb.GetClusterStateRequest())).status
        return all(node.weight_step == 4 for node in status.nodes)

    gateway = await cluster.gateway(scheduler)
    await eventually(has_stepped)
