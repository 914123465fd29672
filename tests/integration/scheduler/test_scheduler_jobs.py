"""Training jobs from creation to their end, on a real scheduler with fake nodes."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from itertools import chain
from typing import Any

import grpc
import pytest

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.internal.v1 import work_pb2
from lemix.v1 import training_service_pb2, types_pb2
from services.ledger import Ledger
from tests.integration.scheduler.cluster import Cluster, eventually
from tests.integration.scheduler.fakes import FakeGateway


async def store(gateway: FakeGateway, count: int) -> str:
    """A file of distinguishable examples, in two batches."""

    async def parts() -> AsyncIterator[pb.StoreFileRequest]:
        examples = [work_pb2.TrainingExample(token_ids=[number, number + 1]) for number in range(count)]
        yield pb.StoreFileRequest(file=work_pb2.FileRecord(filename="f.jsonl", size_bytes=10, num_examples=count))
        yield pb.StoreFileRequest(examples=examples[:2])
        yield pb.StoreFileRequest(examples=examples[2:])

    stored = (await gateway.stub.StoreFile(parts())).file
    assert (stored.num_examples, stored.max_tokens) == (count, 2)
    assert (await gateway.stub.GetFile(pb.GetFileRequest(file_id=stored.file_id))).file == stored
    return str(stored.file_id)


async def create(gateway: FakeGateway, file_id: str, request_id: str = "", **hyperparameters: Any) -> Any:
    """A new job."""
    request = training_service_pb2.CreateJobRequest(
        model="m",
        training_file=file_id,
        request_id=request_id,
        hyperparameters=types_pb2.Hyperparameters(**hyperparameters),
    )
    return (await gateway.stub.CreateJob(pb.CreateJobRequest(request=request))).job


async def job(gateway: FakeGateway, job_id: str) -> Any:
    """The job now."""
    return (await gateway.stub.GetJob(pb.GetJobRequest(job_id=job_id))).job


async def watch(gateway: FakeGateway, job_id: str, after: int = 0) -> list[pb.WatchJobResponse]:
    """Everything until the job ends."""
    request = pb.WatchJobRequest(job_id=job_id, after_sequence=after)
    return [message async for message in gateway.stub.WatchJob(request, timeout=10.0)]


async def failure(call: Any) -> LemixError:
    """What a call fails with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return LemixError.from_rpc(caught.value)


async def fails(call: Any) -> ErrorCode:
    """Code a call fails with."""
    return (await failure(call)).code


async def test_a_job_trains_every_example_of_every_epoch_and_succeeds(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    node, gateway = await cluster.node(scheduler), await cluster.gateway(scheduler)
    created = await create(gateway, await store(gateway, 5), num_epochs=2, batch_size=2)
    assert created.status == types_pb2.JOB_STATUS_QUEUED
    assert (created.total_microbatches, created.num_examples) == (6, 5)
    assert created.hyperparameters.learning_rate == pytest.approx(1e-4)
    seen: list[list[int]] = []
    for number in range(6):
        delivery = await node.take()
        assert delivery.item.training.total_steps == 6
        assert delivery.item.training.last == (number == 5), "the group of the job's last one waits for nobody"
        seen.append([example.token_ids[0] for example in delivery.item.training.examples])
        await node.finish(delivery)
    messages = await watch(gateway, created.job_id)
    assert sorted(chain(*seen[:3])) == sorted(chain(*seen[3:])) == [0, 1, 2, 3, 4]
    assert [message.event.sequence for message in messages] == list(range(1, len(messages) + 1))
    done = messages[-1].job
    assert done.status == types_pb2.JOB_STATUS_SUCCEEDED
    assert (done.trained_microbatches, done.trained_tokens, done.last_loss) == (6, 18, 2.0)
    assert dict(done.steps_per_node) == {"n0": 6}
    assert done.finished_unix_s >= done.created_unix_s
    assert await watch(gateway, created.job_id, after=messages[-2].event.sequence) == messages[-1:]


async def test_creating_is_idempotent_by_request_id(cluster: Cluster) -> None:
    gateway = await cluster.gateway(await cluster.scheduler())
    file_id = await store(gateway, 3)
    first = await create(gateway, file_id, "once")
    assert (await create(gateway, file_id, "once")).job_id == first.job_id
    other = await create(gateway, file_id)
    listed = (await gateway.stub.ListJobs(pb.ListJobsRequest(limit=5))).jobs
    assert [entry.job_id for entry in listed] == [other.job_id, first.job_id]
    assert len((await gateway.stub.ListJobs(pb.ListJobsRequest(limit=1))).jobs) == 1


async def test_what_cannot_be_a_job(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler(max_running_jobs=1)
    await cluster.node(scheduler)
    gateway = await cluster.gateway(scheduler)
    file_id = await store(gateway, 3)
    assert await fails(create(gateway, "file-none")) is ErrorCode.NOT_FOUND
    assert await fails(create(gateway, file_id, num_epochs=1001)) is ErrorCode.INVALID_REQUEST
    request = training_service_pb2.CreateJobRequest(model="other", training_file=file_id)
    assert await fails(gateway.stub.CreateJob(pb.CreateJobRequest(request=request))) is ErrorCode.MODEL_NOT_FOUND
    await create(gateway, file_id)
    assert await fails(create(gateway, file_id)) is ErrorCode.OVERLOADED
    assert (await failure(create(gateway, "file-none"))).param == "training_file"
    for method, message, param in (
        (gateway.stub.GetJob, pb.GetJobRequest(job_id="none"), "job_id"),
        (gateway.stub.CancelJob, pb.CancelJobRequest(job_id="none"), "job_id"),
        (gateway.stub.GetFile, pb.GetFileRequest(file_id="none"), "file_id"),
    ):
        error = await failure(method(message))
        assert (error.code, error.param) == (ErrorCode.NOT_FOUND, param)


async def test_adapters_of_projections_that_some_node_lacks_are_refused(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    gateway = await cluster.gateway(scheduler)
    file_id = await store(gateway, 3)

    def wanted(*targets: str, model: str = "m") -> Any:
        lora = types_pb2.Lora(target_modules=targets)
        request = training_service_pb2.CreateJobRequest(model=model, training_file=file_id, lora=lora)
        return gateway.stub.CreateJob(pb.CreateJobRequest(request=request))

    await wanted("nobody_knows")
    await cluster.node(scheduler, "silent")
    await wanted("nobody_knows")
    await cluster.node(scheduler, "n0", projections=["q_proj", "v_proj", "up_proj"])
    await cluster.node(scheduler, "n1", projections=["v_proj", "q_proj"])
    for targets in (("v_proj", "q_proj"), ("all-linear",), ()):
        assert list((await wanted(*targets)).job.lora.target_modules) == list(targets)
    for unknown, targets in (("up_proj", ("v_proj", "up_proj")), ("all-linear", ("all-linear", "q_proj"))):
        for model in ("m", ""):
            error = await failure(wanted(*targets, model=model))
            assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, "lora.target_modules")
            known = "it has q_proj, v_proj, or all-linear"
            assert error.message == f"the model has no projection {unknown!r} to adapt; {known}"


async def test_a_cancelled_job_leaves_its_nodes(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler(core={"policy": "round_robin", "max_inflight_training": 2})
    node, gateway = await cluster.node(scheduler), await cluster.gateway(scheduler)
    created = await create(gateway, await store(gateway, 10))
    held = {(await node.take()).item.task_id for _ in range(2)}
    cancelled = (await gateway.stub.CancelJob(pb.CancelJobRequest(job_id=created.job_id))).job
    assert cancelled.status == types_pb2.JOB_STATUS_CANCELLED
    assert {(await node.command()).cancel.task_id for _ in range(2)} == held
    again = (await gateway.stub.CancelJob(pb.CancelJobRequest(job_id=created.job_id))).job
    assert again.status == types_pb2.JOB_STATUS_CANCELLED
    assert (await watch(gateway, created.job_id))[-1].event.message == "the job was cancelled"


async def test_a_job_that_has_succeeded_cannot_be_cancelled(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    node, gateway = await cluster.node(scheduler), await cluster.gateway(scheduler)
    node.serve()
    created = await create(gateway, await store(gateway, 3))
    await watch(gateway, created.job_id)
    code = await fails(gateway.stub.CancelJob(pb.CancelJobRequest(job_id=created.job_id)))
    assert code is ErrorCode.CONFLICT


async def test_a_failed_microbatch_fails_its_job(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    node, gateway = await cluster.node(scheduler), await cluster.gateway(scheduler)
    created = await create(gateway, await store(gateway, 4))
    delivery = await node.take()
    error = LemixError(ErrorCode.RESOURCE_EXHAUSTED, "needs 9 bytes, has 8").to_proto()
    training = work_pb2.TrainingOutcome(job_id=created.job_id, sequence=0, error=error)
    await node.end(delivery, work_pb2.WorkOutcome(task_id=delivery.item.task_id, node_id="n0", training=training))
    last = (await watch(gateway, created.job_id))[-1]
    assert last.job.status == types_pb2.JOB_STATUS_FAILED
    assert last.job.error == error
    assert last.event.level == "error"


def skipped(job_id: str, sequence: int) -> work_pb2.WorkOutcome:
    error = LemixError(ErrorCode.INTERNAL, "the loss is nan").to_proto()
    training = work_pb2.TrainingOutcome(job_id=job_id, sequence=sequence, error=error, skipped=True)
    return work_pb2.WorkOutcome(task_id=f"{job_id}/{sequence}", node_id="n0", training=training)


async def test_a_job_bears_some_losses_that_are_not_finite(cluster: Cluster) -> None:
    """Two of them in a row, then a good one, then the third in a row too many."""
    scheduler = await cluster.scheduler()
    node, gateway = await cluster.node(scheduler), await cluster.gateway(scheduler)
    created = await create(gateway, await store(gateway, 9))
    assert created.hyperparameters.max_skipped_in_row == 3
    for number in range(6):
        delivery = await node.take()
        if number == 2:
            await node.finish(delivery)
        else:
            await node.end(delivery, skipped(created.job_id, delivery.item.training.sequence))
    messages = await watch(gateway, created.job_id)
    last = messages[-1].job
    assert (last.status, last.trained_microbatches, last.skipped_microbatches) == (types_pb2.JOB_STATUS_FAILED, 1, 5)
    assert last.error.message == "3 micro-batches in a row were skipped, the last because: the loss is nan"
    warnings = [message.event.message for message in messages if message.event.level == "warn"]
    assert warnings[0] == "skipped micro-batch 0 (1 of 3 in a row): the loss is nan"
    assert len(warnings) == 5


async def test_a_job_with_skipped_microbatches_can_succeed(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    node, gateway = await cluster.node(scheduler), await cluster.gateway(scheduler)
    created = await create(gateway, await store(gateway, 2))
    await node.finish(await node.take())
    delivery = await node.take()
    await node.end(delivery, skipped(created.job_id, delivery.item.training.sequence))
    last = (await watch(gateway, created.job_id))[-1].job
    assert (last.status, last.trained_microbatches, last.skipped_microbatches) == (types_pb2.JOB_STATUS_SUCCEEDED, 1, 1)


async def test_microbatches_of_a_lost_node_are_trained_once_each(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    lost, gateway = await cluster.node(scheduler, "n0"), await cluster.gateway(scheduler)
    created = await create(gateway, await store(gateway, 8))
    await lost.finish(await lost.take())
    await lost.take()
    await lost.vanish()
    other = await cluster.node(scheduler, "n1")
    other.serve()
    done = (await watch(gateway, created.job_id))[-1].job
    assert done.status == types_pb2.JOB_STATUS_SUCCEEDED
    assert done.trained_microbatches == 8
    assert sorted(lost.trained + other.trained) == sorted(f"{created.job_id}/{number}" for number in range(8))


async def test_a_restarted_scheduler_goes_on_with_a_job(cluster: Cluster) -> None:
    first = await cluster.scheduler()
    node, gateway = await cluster.node(first, "n0"), await cluster.gateway(first)
    created = await create(gateway, await store(gateway, 12))
    for _ in range(3):
        await node.finish(await node.take())

    async def has_three() -> bool:
        return bool((await job(gateway, created.job_id)).trained_microbatches == 3)

    await eventually(has_three)
    held = await node.take()
    trained = list(node.trained)
    await gateway.disconnect()
    await node.vanish()
    await cluster.stop(first)

    second = await cluster.scheduler()
    gateway = await cluster.gateway(second)
    assert (await job(gateway, created.job_id)).trained_microbatches == 3
    node = await cluster.node(second, "n0")
    await node.finish(held)
    node.serve()
    messages = await watch(gateway, created.job_id)
    done = messages[-1].job
    assert (done.status, done.trained_microbatches) == (types_pb2.JOB_STATUS_SUCCEEDED, 12)
    assert sorted(trained + node.trained) == sorted(f"{created.job_id}/{number}" for number in range(12))
    assert [message.event.sequence for message in messages] == list(range(1, len(messages) + 1))


async def test_outcomes_reported_to_nobody_count_after_a_restart(cluster: Cluster) -> None:
    first = await cluster.scheduler()
    node, gateway = await cluster.node(first, "n0"), await cluster.gateway(first)
    created = await create(gateway, await store(gateway, 4))
    early = [await node.take(), await node.take()]
    await gateway.disconnect()
    await node.vanish()
    await cluster.stop(first)
    for delivery in early:
        assert await node.finish(delivery, report=False)

    second = await cluster.scheduler()
    gateway = await cluster.gateway(second)
    again = await cluster.node(second, "n0")
    again.serve()
    done = (await watch(gateway, created.job_id))[-1].job
    assert done.trained_microbatches == 4
    assert len(node.trained + again.trained) == 4


async def test_feedback_is_trained_as_it_comes(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler(max_feedback_backlog=2, feedback_learning_rate=2e-3)
    node, gateway = await cluster.node(scheduler), await cluster.gateway(scheduler)

    async def give(number: int, request_id: str = "") -> Any:
        example = work_pb2.TrainingExample(token_ids=[number, number])
        request = pb.SubmitFeedbackRequest(example=example, request_id=request_id, model="m")
        return await gateway.stub.SubmitFeedback(request)

    first = await give(10, "a")
    assert first.sequence == 1
    assert (await give(10, "a")).sequence == 1
    second = await give(11)
    assert (second.job_id, second.sequence) == (first.job_id, 2)
    assert await fails(give(12)) is ErrorCode.OVERLOADED
    for number in (10, 11):
        delivery = await node.take()
        assert delivery.item.training.examples[0].token_ids[0] == number
        assert delivery.item.training.total_steps == 0
        assert delivery.item.training.hyperparameters.learning_rate == 2e-3
        assert not delivery.item.training.last
        await node.finish(delivery)

    async def is_trained() -> bool:
        return bool((await job(gateway, first.job_id)).trained_microbatches == 2)

    await eventually(is_trained)
    running = await job(gateway, first.job_id)
    assert running.status == types_pb2.JOB_STATUS_RUNNING
    assert (running.total_microbatches, running.num_examples, running.training_file) == (0, 2, "")
    assert (await give(12)).sequence == 3
    empty = pb.SubmitFeedbackRequest(example=work_pb2.TrainingExample(token_ids=[1]))
    assert await fails(gateway.stub.SubmitFeedback(empty)) is ErrorCode.INVALID_REQUEST


async def test_feedback_goes_on_after_a_restart(cluster: Cluster) -> None:
    first = await cluster.scheduler()
    gateway = await cluster.gateway(first)
    example = work_pb2.TrainingExample(token_ids=[1, 2])
    given = await gateway.stub.SubmitFeedback(pb.SubmitFeedbackRequest(example=example, model="m"))
    await gateway.disconnect()
    await cluster.stop(first)
    second = await cluster.scheduler()
    gateway = await cluster.gateway(second)
    again = await gateway.stub.SubmitFeedback(pb.SubmitFeedbackRequest(example=example, model="m"))
    assert (again.job_id, again.sequence) == (given.job_id, 2)
    node = await cluster.node(second)
    assert {(await node.take()).item.training.sequence for _ in range(2)} == {0, 1}


async def test_the_sync_interval_follows_the_newest_job(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler(core={"policy": "round_robin", "sync_every_steps": -1})
    nodes = [await cluster.node(scheduler, name) for name in ("n0", "n1")]
    gateway = await cluster.gateway(scheduler)
    await create(gateway, await store(gateway, 4))  # every 2 steps
    step = pb.NodeSessionRequest(traces=pb.TraceBatch(ops=[pb.OpTrace(stage=0, op=5, duration_s=0.001)]))
    await nodes[0].send(step)
    await nodes[0].send(step)
    assert (await nodes[0].command()).HasField("take_snapshot")


async def test_a_watch_of_the_existing_events_ends_while_the_job_goes_on(cluster: Cluster) -> None:
    gateway = await cluster.gateway(await cluster.scheduler())
    created = await create(gateway, await store(gateway, 3))
    request = pb.WatchJobRequest(job_id=created.job_id, existing_only=True)
    async with asyncio.timeout(5):
        messages = [message async for message in gateway.stub.WatchJob(request)]
    assert [message.event.message for message in messages] == ["the job was accepted"]
    assert (await job(gateway, created.job_id)).status == types_pb2.JOB_STATUS_QUEUED


async def test_a_watch_ends_with_the_scheduler(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    gateway = await cluster.gateway(scheduler)
    created = await create(gateway, await store(gateway, 4))
    watching = asyncio.create_task(watch(gateway, created.job_id))

    async def is_watching() -> bool:
        return (await job(gateway, created.job_id)).job_id == created.job_id

    await eventually(is_watching)
    await cluster.stop(scheduler)
    assert await fails(watching) is ErrorCode.UNAVAILABLE


async def test_nothing_is_left_of_an_upload_that_breaks(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    known = uuid.UUID(int=7)
    monkeypatch.setattr("services.scheduler.server.uuid.uuid4", lambda: known)
    scheduler = await cluster.scheduler(max_file_examples=3)
    gateway, ledger = await cluster.gateway(scheduler), await cluster.ledger()
    file_id = f"file-{known.hex[:16]}"
    stored = asyncio.Event()

    async def parts(*, hang: bool) -> AsyncIterator[pb.StoreFileRequest]:
        examples = [work_pb2.TrainingExample(token_ids=[number]) for number in range(2)]
        yield pb.StoreFileRequest(file=work_pb2.FileRecord(filename="f.jsonl", num_examples=4))
        yield pb.StoreFileRequest(examples=examples)
        if hang:
            await eventually(lambda: _is_stored(ledger, file_id))
            stored.set()
            await asyncio.Event().wait()
        yield pb.StoreFileRequest(examples=examples)

    assert await fails(gateway.stub.StoreFile(parts(hang=False))) is ErrorCode.OVERLOADED
    assert not await _is_stored(ledger, file_id)

    call = gateway.stub.StoreFile(parts(hang=True))
    await asyncio.wait_for(stored.wait(), 10.0)
    call.cancel()
    await eventually(lambda: _is_gone(ledger, file_id))


async def _is_stored(ledger: Ledger, file_id: str) -> bool:
    return await ledger.get_file(file_id) is not None


async def _is_gone(ledger: Ledger, file_id: str) -> bool:
    return not await _is_stored(ledger, file_id)
