"""The driver with a scripted core and the ledger in memory."""

import asyncio
from functools import partial
from typing import Any

import pytest

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import work_pb2
from lemix.v1 import errors_pb2, types_pb2
from services.latency import OpKind
from services.ledger import LedgerUnavailable, StaleToken, TaskState
from services.scheduler.core.commands import (
    ApplyWeights,
    Assign,
    CancelOnNode,
    Command,
    Drop,
    Reject,
    SyncMode,
    TakeSnapshot,
)
from services.scheduler.core.events import (
    JobCancelled,
    NodeLost,
    OpFinished,
    SyncEnded,
    TaskArrived,
    TaskCancelled,
    TaskEnded,
    Tick,
)
from services.scheduler.inbox import (
    CancelRequested,
    Ended,
    NodeGone,
    Offered,
    Traced,
    Trained,
)
from tests.unit.scheduler_service.driver_rig import Rig, assign_to, microbatch, served, trained


async def test_an_assignment_is_in_the_ledger_before_the_gateway_hears(rig: Rig) -> None:
    rig.core.answers[TaskArrived] = assign_to("n0")
    await rig.handle(await rig.accept("r"))
    (item,) = await rig.ledger.unfinished("n0")
    assert (item.task_id, item.fencing_token) == ("r", 1)
    assert rig.peers.told == [("assigned", "r", "n0")]


async def test_the_end_reaches_core_and_gateway_once(rig: Rig) -> None:
    rig.core.answers[TaskArrived] = assign_to("n0")
    await rig.handle(await rig.accept("r"), Ended(served("r")))
    assert rig.events(TaskEnded) == [TaskEnded("r", "n0", ok=True, output_tokens=1)]
    assert rig.peers.told[-1] == ("finished", "r", 0)
    assert rig.driver.num_tasks == 0


async def test_a_task_that_ended_meanwhile_comes_back_as_an_event(rig: Rig) -> None:
    rig.core.answers[TaskArrived] = assign_to("n1")
    delivered = await rig.accept("r")
    await rig.ledger.close_task(served("r"), entry_id=None)
    await rig.handle(delivered)
    assert rig.events(TaskEnded) == [TaskEnded("r", "n1", ok=True, output_tokens=1)]
    assert rig.peers.told == [("finished", "r", 0)]
    assert await rig.ledger.unfinished("n1") == []


async def test_a_cancel_before_the_delivery_counts(rig: Rig) -> None:
    delivered = await rig.accept("r")
    await rig.handle(CancelRequested("r"), delivered)
    assert rig.events(TaskArrived) == []
    assert rig.peers.told == [("finished", "r", errors_pb2.ERROR_CODE_CANCELLED)]
    await rig.handle(CancelRequested("nobody"))  # leaves nothing behind
    await rig.handle(await rig.accept("nobody"))
    assert len(rig.events(TaskArrived)) == 1


async def test_a_dropped_task_is_closed(rig: Rig) -> None:
    rig.core.answers[TaskCancelled] = lambda event: [Drop(event.task_id)]
    await rig.handle(await rig.accept("r"), CancelRequested("r"))
    record = await rig.ledger.record("r")
    assert record is not None
    assert record.outcome is not None
    assert record.outcome.inference.finish_reason == types_pb2.FINISH_REASON_CANCELLED


async def test_a_lasting_refusal_is_stored_and_a_passing_one_is_not(rig: Rig) -> None:
    rig.core.answers[TaskArrived] = lambda event: [Reject(event.task.task_id, "CONTEXT_LENGTH_EXCEEDED", "too long")]
    await rig.handle(await rig.accept("long"))
    rig.core.answers[TaskArrived] = lambda event: [Reject(event.task.task_id, "OVERLOADED", "full", 1.0)]
    await rig.handle(await rig.accept("late"))
    stored = await rig.ledger.record("long")
    assert stored is not None
    assert stored.state is TaskState.DONE
    assert await rig.ledger.record("late") is None
    assert rig.peers.told == [
        ("rejected", "long", ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        ("rejected", "late", ErrorCode.OVERLOADED),
    ]


async def test_a_refused_microbatch_stays_accepted(rig: Rig) -> None:
    rig.core.answers[TaskArrived] = lambda event: [Reject(event.task.task_id, "OVERLOADED", "full", 1.0)]
    await rig.handle(Offered(microbatch()))
    assert ("refused", 0, ErrorCode.OVERLOADED) in rig.peers.told
    assert await rig.ledger.record("j/0") is None


async def test_a_microbatch_is_written_for_its_node_when_it_is_assigned(rig: Rig) -> None:
    rig.core.answers[TaskArrived] = assign_to("n0")
    await rig.handle(Offered(microbatch(3)))
    assert [item.task_id for item in await rig.ledger.unfinished("n0")] == ["j/3"]
    assert rig.peers.told == [("held", 3, True), ("held", 3, False)]


async def test_a_trained_microbatch_leaves_the_core_and_stays_in_the_ledger(rig: Rig) -> None:
    rig.core.answers[TaskArrived] = assign_to("n0")
    await rig.handle(Offered(microbatch(0)), Trained(trained(0)))
    assert rig.events(TaskEnded) == [TaskEnded("j/0", "n0", ok=True)]
    assert rig.driver.num_tasks == 0
    assert [item.task_id for item in await rig.ledger.unfinished("n0")] == ["j/0"]
    assert rig.peers.told[-1] == ("trained", 0)


async def test_a_node_that_trained_what_another_one_has_now_is_not_believed(rig: Rig) -> None:
    rig.core.answers[TaskArrived] = assign_to("n1")
    await rig.handle(Offered(microbatch(0)), Trained(trained(0, "n0")))
    assert rig.events(TaskEnded) == []
    assert ("trained", 0) not in rig.peers.told


async def test_what_jobs_answer_reaches_the_core(rig: Rig) -> None:
    error = LemixError(ErrorCode.INTERNAL, "x").to_proto()
    training = work_pb2.TrainingOutcome(job_id="j", sequence=0, error=error)
    await rig.handle(Ended(work_pb2.WorkOutcome(task_id="j/0", node_id="n0", training=training)))
    assert rig.events(JobCancelled) == [JobCancelled("j")]


async def test_a_node_is_told_how_far_to_cut(rig: Rig) -> None:
    """And a node that takes the micro-batch over from a lost one is told anew."""
    for node_id, parts in (("n0", 5), ("n1", 2)):
        answer = partial(lambda command, event: [command], Assign("j/0", node_id, parts=parts))
        rig.core.answers = {TaskArrived: answer, NodeLost: answer}
        await rig.handle(Offered(microbatch()) if node_id == "n0" else NodeGone("n0", "lost"))
        (item,) = await rig.ledger.unfinished(node_id)
        assert item.training.parts == parts


async def test_a_node_is_told_how_to_queue(rig: Rig) -> None:
    """And a node that takes the request over from a lost one is told anew."""
    for node_id, queue_ttft_s in (("n0", 6.0), ("n1", None)):
        answer = partial(lambda command, event: [command], Assign("r", node_id, queue_ttft_s=queue_ttft_s))
        rig.core.answers = {TaskArrived: answer, NodeLost: answer}
        await rig.handle(await rig.accept("r") if node_id == "n0" else NodeGone("n0", "lost"))
        (item,) = await rig.ledger.unfinished(node_id)
        assert item.inference.HasField("queue_ttft_s") == (queue_ttft_s is not None)
        assert item.inference.queue_ttft_s == (queue_ttft_s or 0.0)


async def test_an_overdue_request_is_not_assigned(rig: Rig) -> None:
    rig.core.answers[TaskArrived] = assign_to("n0")
    delivered = await rig.accept("r", deadline_unix_s=rig.clock.unix_s() + 1.0)

    def late(event: TaskArrived) -> list[Command]:
        rig.clock.advance(2.0)
        return [Assign(event.task.task_id, "n0")]

    rig.core.answers[TaskArrived] = late
    await rig.handle(delivered)
    assert rig.peers.told == [("finished", "r", errors_pb2.ERROR_CODE_DEADLINE_EXCEEDED)]
    assert rig.events(TaskEnded) == [TaskEnded("r", "n0", ok=False)]


async def test_a_synchronisation_with_a_missing_node_fails_there(rig: Rig) -> None:
    rig.core.answers[OpFinished] = lambda event: [
        TakeSnapshot("s", "n0"),
        ApplyWeights("s", "n1", SyncMode.AVERAGE, ("n0",)),
        TakeSnapshot("s", "gone"),
        CancelOnNode("r", "gone"),
    ]
    await rig.handle(Traced((OpFinished("n0", 0, OpKind.OPTIMIZER_STEP, 0.0, 1.0),)))
    assert rig.peers.told == [("n0", "take_snapshot"), ("n1", "apply_weights")]
    assert rig.events(SyncEnded) == [SyncEnded("s", "gone", ok=False)]


async def test_the_core_gets_a_tick_when_it_asked_for_one(rig: Rig) -> None:
    rig.core.wakeup_s = rig.clock.monotonic_s() - 1.0
    ticked = asyncio.Event()
    rig.core.answers[Tick] = lambda event: ticked.set() or []
    running = asyncio.create_task(rig.driver.run())
    await asyncio.wait_for(ticked.wait(), 5.0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert rig.core.seen == [Tick()]


async def test_a_newer_scheduler_ends_this_one(rig: Rig) -> None:
    rig.core.answers[TaskArrived] = assign_to("n0")
    delivered = await rig.accept("r")
    await rig.ledger.acquire_leadership()
    with pytest.raises(StaleToken):
        await rig.handle(delivered)


async def test_an_outage_delays_an_assignment_and_loses_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.core.answers[TaskArrived] = assign_to("n0")
    delivered = await rig.accept("r")
    real, failures = rig.ledger.assign, [1, 1]

    async def flaky(*arguments: Any, **options: Any) -> bool:
        if failures:
            failures.pop()
            raise LedgerUnavailable("away")
        return await real(*arguments, **options)

    monkeypatch.setattr(rig.ledger, "assign", flaky)
    await rig.handle(delivered)
    assert rig.peers.told == [("assigned", "r", "n0")]
    assert len(rig.events(TaskArrived)) == 1
