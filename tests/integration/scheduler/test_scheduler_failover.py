"""Another node goes on from the checkpoint of a lost one, where nothing gets lost by it."""

from typing import Any

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.v1 import types_pb2
from services.ledger import Delivery
from services.scheduler.service import SchedulerService
from tests.integration.scheduler.cluster import Cluster, eventually
from tests.integration.scheduler.fakes import FakeGateway, FakeNode
from tests.integration.scheduler.test_scheduler_checkpoints import checkpoint, shows, train
from tests.integration.scheduler.test_scheduler_jobs import create, job, store, watch

ON: dict[str, Any] = {"checkpoint_failover": True, "node_return_s": 0.3}


async def saves(node: FakeNode, pairs: list[tuple[Delivery, Any]]) -> None:
    """A checkpoint that contains these two."""
    made = checkpoint(2)
    await node.send(pb.NodeSessionRequest(checkpoint=pb.CheckpointReport(checkpoint=made, held=[made])))
    for delivery, outcome in pairs:
        assert await node.end(delivery, outcome)


async def restores(node: FakeNode, *, error: LemixError | None = None) -> None:
    """Answer the scheduler, which asks for the checkpoint of n0."""
    command = (await node.command()).checkpoint
    assert command.restore == "n0:1:2"
    report = pb.CheckpointReport(request_id=command.request_id)
    if error is None:
        report.checkpoint.CopyFrom(types_pb2.Checkpoint(checkpoint_id="n1:1:1", node_id="n1", reason="rollback"))
    else:
        report.error.CopyFrom(error.to_proto())
    await node.send(pb.NodeSessionRequest(checkpoint=report))


async def one_of_two(cluster: Cluster, scheduler: SchedulerService) -> tuple[FakeNode, FakeNode, FakeGateway, str]:
    """A job of four of which n0 has trained three and saved two; n1 stands beside it."""
    lost = await cluster.node(scheduler, keeps_checkpoints=True, incarnation=1)
    gateway = await cluster.gateway(scheduler)
    created = await create(gateway, await store(gateway, 4))
    pairs = await train(lost, 3)
    await saves(lost, pairs[:2])
    await shows(gateway, created.job_id, 3, 1)
    await lost.take()
    other = await cluster.node(scheduler, "n1", keeps_checkpoints=True, incarnation=1)
    return lost, other, gateway, created.job_id


async def told(gateway: FakeGateway, job_id: str) -> str:
    """What its owner heard when the lost node was given up."""
    messages = [message.event.message for message in await watch(gateway, job_id)]
    return next(text for text in messages if "n0 did not come back" in text)


async def finish_all(node: FakeNode, count: int) -> list[int]:
    """Train so many, each in a checkpoint at once."""
    sequences = []
    for _ in range(count):
        delivery = await node.take()
        sequences.append(delivery.item.training.sequence)
        await node.finish(delivery)
    return sequences


async def test_an_untrained_node_restores_before_it_trains_what_the_checkpoint_lacks(cluster: Cluster) -> None:
    lost, other, gateway, job_id = await one_of_two(cluster, await cluster.scheduler(**ON))
    await lost.vanish()
    await restores(other)
    assert sorted(await finish_all(other, 2)) == [2, 3]
    assert (await told(gateway, job_id)).endswith("n1 goes on from its checkpoint n0:1:2")
    assert (await job(gateway, job_id)).status == types_pb2.JOB_STATUS_SUCCEEDED


async def test_who_stands_by_gets_no_training_until_the_lost_node_is_back(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler(**{**ON, "node_return_s": 30.0})
    lost, other, gateway, job_id = await one_of_two(cluster, scheduler)
    await lost.vanish()
    small = await create(gateway, await store(gateway, 2))

    async def waits() -> bool:
        status = (await gateway.stub.GetClusterState(pb.GetClusterStateRequest())).status
        return len(status.nodes) == 1 and status.waiting_training == 2

    await eventually(waits)
    other.serve()
    hello = {"incarnation": 2, "weights_changed": True, "checkpoints": [checkpoint(2)]}
    (await cluster.node(scheduler, keeps_checkpoints=True, **hello)).serve()
    for wanted in (small.job_id, job_id):
        assert (await watch(gateway, wanted))[-1].job.status == types_pb2.JOB_STATUS_SUCCEEDED
    assert other.commands.empty(), "nobody restored"


async def test_a_restore_that_fails_leaves_everything_as_it_was(cluster: Cluster) -> None:
    lost, other, gateway, job_id = await one_of_two(cluster, await cluster.scheduler(**ON))
    await lost.vanish()
    await restores(other, error=LemixError(ErrorCode.NOT_FOUND, "no such folder"))
    assert sorted(await finish_all(other, 2)) == [2, 3]
    text = await told(gateway, job_id)
    assert text.endswith("n1 could not go on from its checkpoint n0:1:2: no such folder")


async def test_a_node_that_has_trained_itself_is_left_alone(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler(**ON)
    before = await cluster.node(scheduler, "n1", keeps_checkpoints=True, incarnation=1)
    gateway = await cluster.gateway(scheduler, "g1")
    created = await create(gateway, await store(gateway, 1))
    await before.finish(await before.take())
    assert (await watch(gateway, created.job_id))[-1].job.status == types_pb2.JOB_STATUS_SUCCEEDED
    await before.vanish()
    lost, other, gateway, job_id = await one_of_two(cluster, scheduler)
    await lost.vanish()
    assert sorted(await finish_all(other, 2)) == [2, 3]
    text = await told(gateway, job_id)
    assert text.endswith("nobody goes on from its checkpoint n0:1:2: n1 has trained itself")
    assert other.commands.empty()


async def test_without_the_setting_nobody_restores(cluster: Cluster) -> None:
    lost, other, gateway, job_id = await one_of_two(
        cluster, await cluster.scheduler(**{**ON, "checkpoint_failover": False})
    )
    await lost.vanish()
    assert sorted(await finish_all(other, 2)) == [2, 3]
    assert "their weights lack what checkpoint n0:1:2 contains" in await told(gateway, job_id)
    assert other.commands.empty()
