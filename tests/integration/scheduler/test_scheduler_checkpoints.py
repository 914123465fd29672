"""Jobs on nodes that keep checkpoints: what a lost node takes along, who trains it again, who asks for checkpoints."""

import asyncio
from typing import Any

import pytest

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.internal.v1 import work_pb2
from lemix.v1 import training_service_pb2, types_pb2
from services.ledger import Delivery
from tests.integration.scheduler.cluster import Cluster, eventually
from tests.integration.scheduler.fakes import FakeGateway, FakeNode
from tests.integration.scheduler.test_scheduler_jobs import create, fails, job, store, watch


def ended(node: FakeNode, delivery: Delivery) -> work_pb2.WorkOutcome:
    """A micro-batch that was trained."""
    work = delivery.item.training
    node.weight_step += 1
    training = work_pb2.TrainingOutcome(
        job_id=work.job_id, sequence=work.sequence, loss=2.0, label_tokens=3, weight_step=node.weight_step
    )
    return work_pb2.WorkOutcome(task_id=delivery.item.task_id, node_id=node.node_id, training=training)


async def train(node: FakeNode, count: int) -> list[tuple[Delivery, work_pb2.WorkOutcome]]:
    """Take micro-batches and tell that they are trained and in no checkpoint."""
    found = []
    for _ in range(count):
        delivery = await node.take()
        found.append((delivery, ended(node, delivery)))
        await node.send(pb.NodeSessionRequest(trained=found[-1][1]))
    return found


async def shows(gateway: FakeGateway, job_id: str, trained: int, unsaved: int) -> None:
    """Wait until the job shows so much progress."""

    async def is_shown() -> bool:
        seen = await job(gateway, job_id)
        return (seen.trained_microbatches, seen.unsaved_microbatches) == (trained, unsaved)

    await eventually(is_shown)


def sequences(pairs: list[tuple[Delivery, work_pb2.WorkOutcome]]) -> list[int]:
    return [delivery.item.training.sequence for delivery, _ in pairs]


def checkpoint(step: int, **trained: int) -> types_pb2.Checkpoint:
    return types_pb2.Checkpoint(
        checkpoint_id=f"n0:1:{step}", node_id="n0", created_unix_s=step, trained_microbatches=trained, reason="interval"
    )


async def test_a_job_ends_when_a_checkpoint_contains_all_of_it(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    node = await cluster.node(scheduler, keeps_checkpoints=True)
    gateway = await cluster.gateway(scheduler)
    created = await create(gateway, await store(gateway, 6))
    pairs = await train(node, 6)
    await shows(gateway, created.job_id, 6, 6)
    assert (await node.command()).checkpoint.save == "job_end"
    running = await job(gateway, created.job_id)
    assert running.status == types_pb2.JOB_STATUS_RUNNING
    assert dict(running.steps_per_node) == {"n0": 6}
    for delivery, outcome in pairs:
        assert await node.end(delivery, outcome)
    final = (await watch(gateway, created.job_id))[-1].job
    assert final.status == types_pb2.JOB_STATUS_SUCCEEDED
    assert (final.trained_microbatches, final.unsaved_microbatches) == (6, 0)
    assert dict(final.steps_per_node) == {"n0": 6}


async def test_a_job_whose_last_micro_batch_was_skipped_ends_with_a_checkpoint_too(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    node = await cluster.node(scheduler, keeps_checkpoints=True)
    gateway = await cluster.gateway(scheduler)
    created = await create(gateway, await store(gateway, 3))
    pairs = await train(node, 2)
    await shows(gateway, created.job_id, 2, 2)
    last = await node.take()
    skipped = ended(node, last)
    skipped.training.skipped = True
    skipped.training.error.CopyFrom(LemixError(ErrorCode.INTERNAL, "the loss is nan").to_proto())
    assert await node.end(last, skipped)
    assert (await node.command()).checkpoint.save == "job_end"
    for delivery, outcome in pairs:
        assert await node.end(delivery, outcome)
    final = (await watch(gateway, created.job_id))[-1].job
    assert final.status == types_pb2.JOB_STATUS_SUCCEEDED
    assert (final.trained_microbatches, final.skipped_microbatches) == (2, 1)


async def test_a_node_that_comes_back_gets_what_its_checkpoint_lacks_in_order(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler(node_return_s=30.0)
    node = await cluster.node(scheduler, keeps_checkpoints=True)
    gateway = await cluster.gateway(scheduler)
    created = await create(gateway, await store(gateway, 12))
    pairs = await train(node, 5)
    for delivery, outcome in pairs[:2]:
        assert await node.end(delivery, outcome)
    await shows(gateway, created.job_id, 5, 3)
    await node.vanish()
    other = await cluster.node(scheduler, "n1")
    successor = await cluster.node(scheduler, keeps_checkpoints=True)
    again = await train(successor, 3)
    assert sequences(again) == [2, 3, 4]
    other.serve()
    assert {f"{created.job_id}/{sequence}" for sequence in (2, 3, 4)}.isdisjoint(other.trained)
    for delivery, outcome in again:
        assert await successor.end(delivery, outcome)


async def test_what_a_node_took_along_for_good_is_trained_by_others(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler(node_return_s=0.3)
    node = await cluster.node(scheduler, keeps_checkpoints=True)
    gateway = await cluster.gateway(scheduler)
    created = await create(gateway, await store(gateway, 4))
    await train(node, 4)
    await shows(gateway, created.job_id, 4, 4)
    other = await cluster.node(scheduler, "n1")
    await node.vanish()
    other.serve()
    messages = await watch(gateway, created.job_id)
    assert other.trained == [f"{created.job_id}/{sequence}" for sequence in range(4)]
    assert messages[-1].job.status == types_pb2.JOB_STATUS_SUCCEEDED
    assert messages[-1].job.trained_microbatches == 4
    told = [message.event.message for message in messages]
    assert any("n0 was lost: 4 micro-batches since its newest checkpoint" in message for message in told)
    assert any("n0 did not come back: other nodes train 4 micro-batches again" in message for message in told)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("returns", [True, False])
async def test_ends_that_a_crashed_node_could_not_report_are_learnt(
    cluster: Cluster, told: bool, returns: bool
) -> None:
    """They stand in the ledger: the node dies between the two. told: they were known to be trained."""
    scheduler = await cluster.scheduler(node_return_s=30.0 if returns else 0.3)
    node = await cluster.node(scheduler, keeps_checkpoints=True, incarnation=1)
    gateway = await cluster.gateway(scheduler)
    created = await create(gateway, await store(gateway, 3))
    deliveries = [await node.take() for _ in range(3)]
    pairs = [(delivery, ended(node, delivery)) for delivery in deliveries]
    for _, outcome in pairs if told else ():
        await node.send(pb.NodeSessionRequest(trained=outcome))
    await shows(gateway, created.job_id, *(3, 3) if told else (0, 0))
    for delivery, outcome in pairs[:2]:
        assert await node.end(delivery, outcome, report=False)
    await node.vanish()
    heir = await cluster.node(scheduler, *() if returns else ("n1",), keeps_checkpoints=True, incarnation=2)
    heir.serve()
    final = (await watch(gateway, created.job_id))[-1].job
    assert heir.trained == [f"{created.job_id}/2"], "the others are done"
    assert (final.status, final.trained_microbatches) == (types_pb2.JOB_STATUS_SUCCEEDED, 3)


@pytest.mark.parametrize("keeps_checkpoints", [True, False])
async def test_only_a_node_with_checkpoints_is_waited_for_after_a_restart(
    cluster: Cluster, keeps_checkpoints: bool
) -> None:
    first = await cluster.scheduler()
    node = await cluster.node(first, keeps_checkpoints=keeps_checkpoints)
    gateway = await cluster.gateway(first)
    created = await create(gateway, await store(gateway, 1))
    await gateway.submit("r")
    assert {(await node.take()).item.task_id for _ in range(2)} == {f"{created.job_id}/0", "r"}
    await cluster.stop(first)
    await node.vanish()
    second = await cluster.scheduler(node_lease_s=0.2, node_return_s=30.0)
    other = await cluster.node(second, "n1")
    moved = {"r"} if keeps_checkpoints else {"r", f"{created.job_id}/0"}
    assert {(await other.take()).item.task_id for _ in moved} == moved
    held = await (await cluster.ledger()).unfinished("n0")
    assert {item.task_id for item in held} == {"r", f"{created.job_id}/0"} - moved


async def test_a_new_session_does_not_count_trained_ones_as_work(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    node = await cluster.node(scheduler, keeps_checkpoints=True)
    gateway = await cluster.gateway(scheduler)
    created = await create(gateway, await store(gateway, 12))
    pairs = await train(node, 8)
    await node.vanish()
    await node.join(keeps_checkpoints=True)
    for _, outcome in pairs:
        await node.send(pb.NodeSessionRequest(trained=outcome))
    pairs += await train(node, 4)
    assert sequences(pairs) == list(range(12))
    await shows(gateway, created.job_id, 12, 12)


async def test_a_new_scheduler_learns_what_is_in_no_checkpoint(cluster: Cluster) -> None:
    first = await cluster.scheduler()
    node = await cluster.node(first, keeps_checkpoints=True)
    gateway = await cluster.gateway(first)
    created = await create(gateway, await store(gateway, 6))
    pairs = await train(node, 3)
    await shows(gateway, created.job_id, 3, 3)
    await cluster.stop(first)
    second = await cluster.scheduler()
    successor = await cluster.node(second, keeps_checkpoints=True)
    later = await cluster.gateway(second, "g1")
    for _, outcome in pairs:
        await successor.send(pb.NodeSessionRequest(trained=outcome))
    await shows(later, created.job_id, 3, 3)


async def test_checkpoints_are_saved_listed_exported_and_restored_where_they_lie(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    held = [checkpoint(4, other=2), checkpoint(2)]
    node = await cluster.node(scheduler, keeps_checkpoints=True, checkpoints=held)
    gateway = await cluster.gateway(scheduler)
    created = await create(gateway, await store(gateway, 4))
    await train(node, 1)
    await shows(gateway, created.job_id, 1, 1)

    async def answer(action: str, value: str, **report: Any) -> None:
        command = (await node.command()).checkpoint
        assert (command.WhichOneof("action"), getattr(command, action)) == (action, value)
        message = pb.CheckpointReport(request_id=command.request_id, held=[new, *held], **report)
        await node.send(pb.NodeSessionRequest(checkpoint=message))

    new = checkpoint(5, **{created.job_id: 1})
    saving = asyncio.ensure_future(gateway.stub.SaveCheckpoint(pb.SaveCheckpointRequest(job_id=created.job_id)))
    await answer("save", "request", checkpoint=new)
    assert list((await saving).checkpoints) == [new]
    listed = (await gateway.stub.ListCheckpoints(pb.ListCheckpointsRequest())).checkpoints
    assert [found.checkpoint_id for found in listed] == ["n0:1:5", "n0:1:4", "n0:1:2"]
    listed = (await gateway.stub.ListCheckpoints(pb.ListCheckpointsRequest(job_id="other"))).checkpoints
    assert [found.checkpoint_id for found in listed] == ["n0:1:4"]

    export = pb.ExportCheckpointRequest(checkpoint_id="n0:1:2")
    exporting = asyncio.ensure_future(gateway.stub.ExportCheckpoint(export))
    await answer("export", "n0:1:2", checkpoint=held[1], path="/somewhere")
    assert await exporting == pb.ExportCheckpointResponse(node_id="n0", path="/somewhere")

    restore = pb.RestoreCheckpointRequest(checkpoint_id="n0:1:4")
    restoring = asyncio.ensure_future(gateway.stub.RestoreCheckpoint(restore))
    version = types_pb2.WeightVersion(node_id="n0", incarnation=1, step=6)
    await answer("restore", "n0:1:4", checkpoint=held[0], version=version)
    assert (await restoring).version == version

    refused = LemixError(ErrorCode.CONFLICT, "it is of another model")
    restoring = asyncio.ensure_future(gateway.stub.RestoreCheckpoint(restore))
    await answer("restore", "n0:1:4", error=refused.to_proto())
    assert await fails(restoring) is ErrorCode.CONFLICT

    restoring = asyncio.ensure_future(gateway.stub.RestoreCheckpoint(restore))
    await node.command()
    await node.vanish()
    assert await fails(restoring) is ErrorCode.NODE_LOST
    assert await fails(gateway.stub.RestoreCheckpoint(restore)) is ErrorCode.NOT_FOUND


async def test_without_a_node_that_keeps_any_there_is_no_checkpoint(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    await cluster.node(scheduler)
    gateway = await cluster.gateway(scheduler)
    created = await create(gateway, await store(gateway, 4))
    save = gateway.stub.SaveCheckpoint(pb.SaveCheckpointRequest(job_id=created.job_id))
    assert await fails(save) is ErrorCode.CONFLICT
    assert await fails(gateway.stub.SaveCheckpoint(pb.SaveCheckpointRequest(job_id="none"))) is ErrorCode.NOT_FOUND


async def test_the_owner_hears_of_a_node_that_started_from_an_older_checkpoint(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    node = await cluster.node(scheduler, keeps_checkpoints=True)
    gateway = await cluster.gateway(scheduler)
    created = await create(gateway, await store(gateway, 4))
    await train(node, 1)
    await node.vanish()
    await cluster.node(scheduler, keeps_checkpoints=True, restore_note="checkpoint x is corrupted")

    async def is_told() -> bool:
        request = pb.WatchJobRequest(job_id=created.job_id, existing_only=True)
        events = [message.event async for message in gateway.stub.WatchJob(request)]
        return ("error", "n0: checkpoint x is corrupted") in [(event.level, event.message) for event in events]

    await eventually(is_told)


class Gated:
    """A job with held-out examples on a node that answers what the test says."""

    def __init__(self, node: FakeNode, gateway: FakeGateway, job_id: str) -> None:
        self.node, self.gateway, self.job_id = node, gateway, job_id
        self.held: list[types_pb2.Checkpoint] = []

    async def saves(self, step: int, loss: float) -> None:
        """The node saves a checkpoint; its held-out loss is this."""
        new = checkpoint(step, **{self.job_id: step})
        self.held.insert(0, new)
        await self.node.send(pb.NodeSessionRequest(checkpoint=pb.CheckpointReport(checkpoint=new, held=self.held)))
        while (message := await self.node.command()).HasField("cancel"):
            pass  # of what the node holds of a job that has ended
        command = message.evaluate
        assert [list(example.token_ids) for example in command.examples] == [
            [number, number + 1] for number in range(3)
        ]
        report = pb.EvaluationReport(request_id=command.request_id, loss=loss, label_tokens=3)
        await self.node.send(pb.NodeSessionRequest(evaluation=report))

    async def job(self) -> Any:
        return await job(self.gateway, self.job_id)

    async def told(self, part: str) -> None:
        """Wait for an event that holds this text."""

        async def is_told() -> bool:
            request = pb.WatchJobRequest(job_id=self.job_id, existing_only=True)
            return any([part in message.event.message async for message in self.gateway.stub.WatchJob(request)])

        await eventually(is_told)


async def gated(cluster: Cluster, scheduler: Any, **gate: Any) -> Gated:
    node = await cluster.node(scheduler, keeps_checkpoints=True)
    gateway = await cluster.gateway(scheduler)
    request = training_service_pb2.CreateJobRequest(
        model="m",
        training_file=await store(gateway, 6),
        validation_file=await store(gateway, 3),
        quality_gate=types_pb2.QualityGate(**gate),
    )
    created = (await gateway.stub.CreateJob(pb.CreateJobRequest(request=request))).job
    await train(node, 1)
    return Gated(node, gateway, created.job_id)


async def test_the_heldout_loss_decides_which_checkpoint_is_kept(cluster: Cluster) -> None:
    made = await gated(cluster, await cluster.scheduler())
    await made.saves(1, 3.0)
    kept = (await made.node.command()).checkpoint.keep
    assert (kept.job_id, kept.checkpoint_id) == (made.job_id, "n0:1:1")
    await made.told("held-out loss of checkpoint n0:1:1 is 3.0000: best")
    await made.saves(2, 3.5)
    await made.told("held-out loss of checkpoint n0:1:2 is 3.5000: bad")
    seen = await made.job()
    assert (seen.heldout_loss, seen.best_heldout_loss, seen.best_checkpoint_id) == (3.5, 3.0, "n0:1:1")
    listed = (await made.gateway.stub.ListCheckpoints(pb.ListCheckpointsRequest(job_id=made.job_id))).checkpoints
    assert [(found.checkpoint_id, found.heldout_loss) for found in listed] == [("n0:1:2", 3.5), ("n0:1:1", 3.0)]


async def test_a_node_goes_back_to_its_best_checkpoint_after_bad_ones(cluster: Cluster) -> None:
    made = await gated(cluster, await cluster.scheduler(), max_bad_evaluations=2)
    await made.saves(1, 3.0)
    await made.node.command()  # to keep it
    await made.saves(2, float("inf"))
    await made.told("is inf: bad")
    await made.saves(3, 4.0)
    command = (await made.node.command()).checkpoint
    assert command.restore == "n0:1:1"
    copy = checkpoint(4, **{made.job_id: 3})
    copy.reason = "rollback"
    report = pb.CheckpointReport(request_id=command.request_id, checkpoint=copy, held=[copy, *made.held])
    await made.node.send(pb.NodeSessionRequest(checkpoint=report))
    await made.told("n0 went back to checkpoint n0:1:1 because of its held-out loss")
    await made.saves(5, 3.1)  # the next command is for this one: the copy was not measured again
    await made.told("held-out loss of checkpoint n0:1:5 is 3.1000: bad")


async def publishes(made: Gated, other: FakeNode, *, error: LemixError | None = None) -> None:
    """The other node takes over what it is told to."""
    apply = (await other.command()).apply_weights
    assert list(apply.source_addresses) == [made.node.address]
    assert apply.mode == pb.SYNC_MODE_REPLACE
    finished = pb.SyncFinished(sync_id=apply.sync_id, weight_step=7)
    if error is not None:
        finished.error.CopyFrom(error.to_proto())
    await other.send(pb.NodeSessionRequest(sync_finished=finished))


async def test_a_bad_checkpoint_is_published_only_by_force(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    made = await gated(cluster, scheduler)
    other = await cluster.node(scheduler, "n1", incarnation=5)
    await made.saves(1, 3.0)
    await made.node.command()  # to keep it
    await made.saves(2, 3.5)
    await made.told("3.5000: bad")
    stub = made.gateway.stub
    for checkpoint_id, code in (("n0:1:2", ErrorCode.CONFLICT), ("n9:1:2", ErrorCode.NOT_FOUND)):
        refused = pb.PublishCheckpointRequest(checkpoint_id=checkpoint_id)
        assert await fails(stub.PublishCheckpoint(refused)) is code
    forced = asyncio.ensure_future(
        stub.PublishCheckpoint(pb.PublishCheckpointRequest(checkpoint_id="n0:1:2", force=True))
    )
    await publishes(made, other)
    (version,) = (await forced).versions
    assert (version.node_id, version.incarnation, version.step) == ("n1", 5, 7)
    failing = asyncio.ensure_future(
        stub.PublishCheckpoint(pb.PublishCheckpointRequest(checkpoint_id="n0:1:1", node_ids=["n1"]))
    )
    await publishes(made, other, error=LemixError(ErrorCode.CONFLICT, "of another model"))
    assert await fails(failing) is ErrorCode.CONFLICT
    away = pb.PublishCheckpointRequest(checkpoint_id="n0:1:1", node_ids=["n7"])
    assert await fails(stub.PublishCheckpoint(away)) is ErrorCode.UNAVAILABLE


async def test_the_gate_holds_when_the_job_has_ended_and_its_scheduler_too(cluster: Cluster) -> None:
    first = await cluster.scheduler()
    made = await gated(cluster, first)
    await made.saves(1, 3.0)
    await made.node.command()  # to keep it
    await made.saves(2, 3.5)
    await made.told("3.5000: bad")
    await made.gateway.stub.CancelJob(pb.CancelJobRequest(job_id=made.job_id))
    await cluster.stop(first)
    second = await cluster.scheduler()
    await cluster.node(second, keeps_checkpoints=True, checkpoints=made.held)
    stub = (await cluster.gateway(second, "g1")).stub
    listed = (await stub.ListCheckpoints(pb.ListCheckpointsRequest())).checkpoints
    assert [(found.checkpoint_id, found.heldout_loss) for found in listed] == [("n0:1:2", 3.5), ("n0:1:1", 3.0)]
    bad = stub.PublishCheckpoint(pb.PublishCheckpointRequest(checkpoint_id="n0:1:2"))
    assert await fails(bad) is ErrorCode.CONFLICT
    good = await stub.PublishCheckpoint(pb.PublishCheckpointRequest(checkpoint_id="n0:1:1"))
    assert list(good.versions) == [], "there is no other node"


async def test_a_checkpoint_saved_after_the_end_of_its_job_is_measured_too(cluster: Cluster) -> None:
    first = await cluster.scheduler()
    made = await gated(cluster, first)
    await made.saves(1, 3.0)
    await made.node.command()  # to keep it
    await made.told("3.0000: best")
    await made.gateway.stub.CancelJob(pb.CancelJobRequest(job_id=made.job_id))
    await made.node.vanish()
    await cluster.stop(first)
    second = await cluster.scheduler()
    made.node = await cluster.node(second, keeps_checkpoints=True, checkpoints=made.held)
    made.gateway = await cluster.gateway(second, "g1")
    await made.saves(2, 3.5)
    await made.told("held-out loss of checkpoint n0:1:2 is 3.5000: bad")
    seen = await made.job()
    assert (seen.status, seen.heldout_loss) == (types_pb2.JOB_STATUS_CANCELLED, 3.5)
    bad = made.gateway.stub.PublishCheckpoint(pb.PublishCheckpointRequest(checkpoint_id="n0:1:2"))
    assert await fails(bad) is ErrorCode.CONFLICT
    later = checkpoint(3, **{made.job_id: 2, "job-other": 1})
    report = pb.CheckpointReport(checkpoint=later, held=[later, *made.held])
    await made.node.send(pb.NodeSessionRequest(checkpoint=report))
    await made.saves(4, 2.5)  # the next command is for this one: the one before held nothing new of the job
    assert (await made.node.command()).checkpoint.keep.checkpoint_id == "n0:1:4"


async def test_every_new_best_is_published_when_the_job_asks_for_it(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    made = await gated(cluster, scheduler, publish=True)
    other = await cluster.node(scheduler, "n1")
    await made.saves(1, 3.0)
    await publishes(made, other)
    await made.told("n1 took over checkpoint n0:1:1")


async def test_heldout_examples_need_a_file_and_a_node_that_keeps_checkpoints(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    await cluster.node(scheduler)
    gateway = await cluster.gateway(scheduler)
    file_id = await store(gateway, 3)
    for validation_file, code in (("none", ErrorCode.NOT_FOUND), (file_id, ErrorCode.INVALID_REQUEST)):
        request = training_service_pb2.CreateJobRequest(
            model="m", training_file=file_id, validation_file=validation_file
        )
        assert await fails(gateway.stub.CreateJob(pb.CreateJobRequest(request=request))) is code
