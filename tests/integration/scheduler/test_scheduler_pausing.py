"""Jobs that are paused, resumed, and taken up again after their end."""

from typing import Any

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.internal.v1 import work_pb2
from lemix.v1 import training_service_pb2, types_pb2
from services.ledger import Delivery
from tests.integration.scheduler.cluster import Cluster
from tests.integration.scheduler.fakes import FakeGateway, FakeNode
from tests.integration.scheduler.test_scheduler_checkpoints import shows, train
from tests.integration.scheduler.test_scheduler_jobs import create, fails, job, store, watch

#: One micro-batch on a node at a time, so that the next ones wait.
ONE = {"policy": "round_robin", "max_inflight_training": 1}


async def pause(gateway: FakeGateway, job_id: str) -> Any:
    return (await gateway.stub.PauseJob(pb.PauseJobRequest(job_id=job_id))).job


async def resume(gateway: FakeGateway, job_id: str) -> Any:
    return (await gateway.stub.ResumeJob(pb.ResumeJobRequest(job_id=job_id))).job


async def cancel(gateway: FakeGateway, job_id: str) -> Any:
    return (await gateway.stub.CancelJob(pb.CancelJobRequest(job_id=job_id))).job


async def end_cancelled(node: FakeNode, delivery: Delivery) -> None:
    """What a node says of a micro-batch of a cancelled job."""
    error = LemixError(ErrorCode.CANCELLED, "cancelled").to_proto()
    work = delivery.item.training
    training = work_pb2.TrainingOutcome(job_id=work.job_id, sequence=work.sequence, error=error)
    await node.end(delivery, work_pb2.WorkOutcome(task_id=delivery.item.task_id, node_id="n0", training=training))


async def has_trained(gateway: FakeGateway, job_id: str, count: int) -> None:
    await shows(gateway, job_id, count, 0)


async def test_a_paused_job_finishes_what_runs_and_goes_on_where_it_was(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler(core=ONE)
    node, gateway = await cluster.node(scheduler), await cluster.gateway(scheduler)
    created = await create(gateway, await store(gateway, 6))
    first = await node.take()
    assert (await pause(gateway, created.job_id)).status == types_pb2.JOB_STATUS_PAUSED
    assert (await pause(gateway, created.job_id)).status == types_pb2.JOB_STATUS_PAUSED
    await node.finish(first)
    await has_trained(gateway, created.job_id, 1)
    other = await create(gateway, await store(gateway, 2))
    node.serve()
    assert (await watch(gateway, other.job_id))[-1].job.status == types_pb2.JOB_STATUS_SUCCEEDED
    assert (await job(gateway, created.job_id)).trained_microbatches == 1, "others train meanwhile, it does not"
    assert (await resume(gateway, created.job_id)).status == types_pb2.JOB_STATUS_RUNNING
    done = (await watch(gateway, created.job_id))[-1].job
    assert (done.status, done.trained_microbatches) == (types_pb2.JOB_STATUS_SUCCEEDED, 6)
    of_job = [task_id for task_id in node.trained if task_id.startswith(created.job_id)]
    assert of_job == [f"{created.job_id}/{sequence}" for sequence in range(6)]
    for method in (pause, resume):
        assert await fails(method(gateway, created.job_id)) is ErrorCode.CONFLICT
        assert await fails(method(gateway, "none")) is ErrorCode.NOT_FOUND


async def test_the_nodes_of_a_paused_job_save_once(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler(core=ONE)
    node = await cluster.node(scheduler, keeps_checkpoints=True)
    gateway = await cluster.gateway(scheduler)
    created = await create(gateway, await store(gateway, 9))
    pairs = await train(node, 2)
    await shows(gateway, created.job_id, 2, 2)
    await pause(gateway, created.job_id)
    pairs += await train(node, 1)  # it was on the node already
    assert (await node.command()).checkpoint.save == "pause"
    for delivery, outcome in pairs:
        assert await node.end(delivery, outcome)
    await has_trained(gateway, created.job_id, 3)
    assert node.commands.empty()


async def test_what_a_lost_node_had_of_a_paused_job_waits_too(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler(core=ONE, node_return_s=0.0)
    lost, gateway = await cluster.node(scheduler), await cluster.gateway(scheduler)
    created = await create(gateway, await store(gateway, 4))
    await lost.take()
    await pause(gateway, created.job_id)
    await lost.vanish()
    other = await cluster.node(scheduler, "n1")
    other.serve()
    small = await create(gateway, await store(gateway, 2))
    await watch(gateway, small.job_id)
    assert not [task_id for task_id in other.trained if task_id.startswith(created.job_id)]
    await resume(gateway, created.job_id)
    assert (await watch(gateway, created.job_id))[-1].job.trained_microbatches == 4
    assert sorted(task_id for task_id in other.trained if task_id.startswith(created.job_id)) == [
        f"{created.job_id}/{sequence}" for sequence in range(4)
    ]


async def test_a_paused_job_survives_its_scheduler_and_can_be_cancelled(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler(core=ONE, max_running_jobs=1, max_paused_jobs=1)
    node, gateway = await cluster.node(scheduler), await cluster.gateway(scheduler)
    file_id = await store(gateway, 3)
    created = await create(gateway, file_id)
    await node.finish(await node.take())
    await has_trained(gateway, created.job_id, 1)
    await pause(gateway, created.job_id)
    running = await create(gateway, file_id)
    assert await fails(pause(gateway, running.job_id)) is ErrorCode.OVERLOADED, "of its own bound"
    assert await fails(resume(gateway, created.job_id)) is ErrorCode.OVERLOADED
    await node.vanish()
    await cluster.stop(scheduler)
    successor = await cluster.scheduler(core=ONE, max_running_jobs=1, max_paused_jobs=1)
    node, gateway = await cluster.node(successor), await cluster.gateway(successor)
    node.serve()
    await watch(gateway, running.job_id)
    assert (await job(gateway, created.job_id)).status == types_pb2.JOB_STATUS_PAUSED
    assert (await cancel(gateway, created.job_id)).status == types_pb2.JOB_STATUS_CANCELLED
    listed = (await gateway.stub.ListJobs(pb.ListJobsRequest(limit=5))).jobs
    assert {entry.job_id: entry.status for entry in listed} == {
        created.job_id: types_pb2.JOB_STATUS_CANCELLED,
        running.job_id: types_pb2.JOB_STATUS_SUCCEEDED,
    }


async def test_a_cancelled_job_goes_on_under_its_own_id(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler(core={"policy": "round_robin", "max_inflight_training": 2})
    node, gateway = await cluster.node(scheduler), await cluster.gateway(scheduler)
    created = await create(gateway, await store(gateway, 5))
    first, second = await node.take(), await node.take()
    await node.finish(second)
    await has_trained(gateway, created.job_id, 1)
    third = await node.take()
    assert (await cancel(gateway, created.job_id)).status == types_pb2.JOB_STATUS_CANCELLED
    resumed = await resume(gateway, created.job_id)
    assert (resumed.status, resumed.trained_microbatches) == (types_pb2.JOB_STATUS_RUNNING, 1)
    for delivery in (first, third):  # only now
        await end_cancelled(node, delivery)
    node.serve()
    done = (await watch(gateway, created.job_id))[-1].job
    assert (done.status, done.trained_microbatches) == (types_pb2.JOB_STATUS_SUCCEEDED, 5)
    assert sorted(node.trained[1:]) == [f"{created.job_id}/{sequence}/1" for sequence in (0, 2, 3, 4)]


async def test_a_failed_job_goes_on_after_a_restart(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler(core=ONE)
    node, gateway = await cluster.node(scheduler), await cluster.gateway(scheduler)
    created = await create(gateway, await store(gateway, 3))
    await node.finish(await node.take())
    delivery = await node.take()
    error = LemixError(ErrorCode.RESOURCE_EXHAUSTED, "needs 9 bytes, has 8").to_proto()
    training = work_pb2.TrainingOutcome(job_id=created.job_id, sequence=1, error=error)
    await node.end(delivery, work_pb2.WorkOutcome(task_id=delivery.item.task_id, node_id="n0", training=training))
    assert (await watch(gateway, created.job_id))[-1].job.status == types_pb2.JOB_STATUS_FAILED
    await node.vanish()
    await cluster.stop(scheduler)
    successor = await cluster.scheduler(core=ONE)
    node, gateway = await cluster.node(successor), await cluster.gateway(successor)
    resumed = await resume(gateway, created.job_id)
    assert not resumed.HasField("error")
    assert not resumed.HasField("finished_unix_s")
    assert (await resume(gateway, created.job_id)).job_id == created.job_id
    node.serve()
    messages = await watch(gateway, created.job_id)
    assert (messages[-1].job.status, messages[-1].job.trained_microbatches) == (types_pb2.JOB_STATUS_SUCCEEDED, 3)
    assert node.trained == [f"{created.job_id}/{sequence}/1" for sequence in (1, 2)]
    assert "the job was failed; it goes on with micro-batch 1" in [message.event.message for message in messages]


async def test_an_isolated_job_whose_adapter_was_freed_is_gone(cluster: Cluster) -> None:
    """Unless it has trained nothing: then it begins again."""
    scheduler = await cluster.scheduler(core=ONE)
    node, gateway = await cluster.node(scheduler), await cluster.gateway(scheduler)
    request = training_service_pb2.CreateJobRequest(
        model="m",
        training_file=await store(gateway, 3),
        lora=types_pb2.Lora(rank=2),
        method=types_pb2.TRAINING_METHOD_LORA,
        mode=types_pb2.TRAINING_MODE_ISOLATED,
    )
    created = (await gateway.stub.CreateJob(pb.CreateJobRequest(request=request))).job
    delivery = await node.take()
    assert (await cancel(gateway, created.job_id)).served_model == ""
    assert (await resume(gateway, created.job_id)).served_model == created.served_model
    await end_cancelled(node, delivery)
    delivery = await node.take()
    assert delivery.item.training.attempt == 1  # or a node that was told to free it would not make it again
    await node.finish(delivery)
    await has_trained(gateway, created.job_id, 1)
    await cancel(gateway, created.job_id)
    assert await fails(resume(gateway, created.job_id)) is ErrorCode.CONFLICT
