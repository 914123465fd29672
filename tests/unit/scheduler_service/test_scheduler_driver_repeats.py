"""What is delivered or submitted again runs once for each time it was asked for."""

from lemix.internal.v1 import work_pb2
from lemix.v1 import errors_pb2, types_pb2
from services.ledger import Delivery
from services.scheduler.core.commands import Assign, Drop
from services.scheduler.core.events import NodeLost, TaskArrived, TaskEnded
from services.scheduler.inbox import (
    CancelRequested,
    Delivered,
    Ended,
    NodeArrived,
    NodeGone,
)
from tests.unit.scheduler_service.driver_rig import SPEC, Rig, assign_to, served


async def cancelled_and_submitted_anew(rig: Rig) -> work_pb2.WorkOutcome:
    """A request that n0 cancelled, which is not reported, and the same one submitted again. Returns the report."""
    rig.core.answers[TaskArrived] = assign_to("n0")
    await rig.handle(await rig.accept("r"))
    (first,) = await rig.ledger.read_node("n0", count=9, block_s=0)
    inference = work_pb2.InferenceOutcome(finish_reason=types_pb2.FINISH_REASON_CANCELLED)
    cancelled = work_pb2.WorkOutcome(task_id="r", node_id="n0", inference=inference)
    assert await rig.ledger.finish("n0", first.entry_id, cancelled)
    rig.core.answers[TaskArrived] = assign_to("n1")
    await rig.handle(await rig.accept("r"))
    assert len(rig.events(TaskArrived)) == 1, "the core has the first attempt still"
    return cancelled


async def test_a_request_submitted_anew_before_its_cancellation_is_reported_runs(rig: Rig) -> None:
    cancelled = await cancelled_and_submitted_anew(rig)
    await rig.handle(Ended(cancelled))
    assert rig.events(TaskEnded) == [TaskEnded("r", "n0", ok=False)]
    assert len(rig.events(TaskArrived)) == 2
    (again,) = await rig.ledger.read_node("n1", count=9, block_s=0)
    assert again.item.task_id == "r"


async def test_a_request_submitted_anew_runs_when_its_node_comes_back_without_the_first_attempt(rig: Rig) -> None:
    await cancelled_and_submitted_anew(rig)
    await rig.handle(NodeArrived(SPEC))
    assert rig.events(TaskEnded) == [TaskEnded("r", "n0", ok=False)]
    assert [item.task_id for item in await rig.ledger.unfinished("n1")] == ["r"]


async def test_a_request_submitted_anew_runs_when_its_first_attempt_is_lost_with_the_node(rig: Rig) -> None:
    await cancelled_and_submitted_anew(rig)
    rig.core.answers[NodeLost] = lambda event: [Drop("r")]
    await rig.handle(NodeGone("n0", "test"))
    assert [item.task_id for item in await rig.ledger.unfinished("n1")] == ["r"]
    assert rig.peers.told[-1] == ("assigned", "r", "n1")


async def test_a_request_submitted_anew_can_be_cancelled_before_it_runs(rig: Rig) -> None:
    await cancelled_and_submitted_anew(rig)
    rig.core.answers[NodeLost] = lambda event: [Drop("r")]
    await rig.handle(CancelRequested("r"), NodeGone("n0", "test"))
    assert rig.peers.told[-1] == ("finished", "r", errors_pb2.ERROR_CODE_CANCELLED)
    assert await rig.ledger.unfinished("n1") == []
    assert len(rig.events(TaskArrived)) == 1


async def test_what_is_read_again_after_it_was_assigned_does_not_run_again(rig: Rig) -> None:
    rig.core.answers[TaskArrived] = assign_to("n0")
    delivered = await rig.accept("r")
    await rig.handle(delivered, delivered, Ended(served("r")))
    assert len(rig.events(TaskArrived)) == 1
    assert rig.peers.told == [("assigned", "r", "n0"), ("finished", "r", 0)]


async def test_what_was_taken_back_and_assigned_again_before_it_was_read_does_not_run_again(rig: Rig) -> None:
    rig.core.answers[TaskArrived] = assign_to("n0")
    rig.core.answers[NodeLost] = lambda event: [Assign("r", "n1")]
    await rig.handle(await rig.accept("r"))
    (item,) = await rig.ledger.unfinished("n0")
    late = Delivered(Delivery(entry_id="999", item=item))
    await rig.handle(NodeGone("n0", "test"), late)
    (held,) = await rig.ledger.read_node("n1", count=9, block_s=0)
    assert await rig.ledger.finish("n1", held.entry_id, served("r", "n1"))
    await rig.handle(Ended(served("r", "n1")))
    assert len(rig.events(TaskArrived)) == 1


async def test_a_repeated_delivery_is_one_task(rig: Rig) -> None:
    delivered = await rig.accept("r")
    await rig.handle(delivered, delivered)
    assert len(rig.events(TaskArrived)) == 1
