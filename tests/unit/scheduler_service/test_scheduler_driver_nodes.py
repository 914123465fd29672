"""Nodes that come, go and come back: what becomes of what they held."""

import pytest

from lemix.internal.v1 import work_pb2
from services.ledger import TaskRecord, TaskState
from services.scheduler.core.commands import Assign
from services.scheduler.core.events import (
    JobCancelled,
    NodeJoined,
    NodeLost,
    TaskArrived,
    TaskCancelled,
    TaskEnded,
    TaskRecovered,
)
from services.scheduler.inbox import (
    Delivered,
    NodeArrived,
    NodeGone,
    Offered,
    Trained,
)
from tests.unit.scheduler_service.driver_rig import SPEC, Rig, assign_to, microbatch, trained


async def test_work_of_a_lost_node_is_taken_back_before_it_is_assigned_again(rig: Rig) -> None:
    rig.core.answers[TaskArrived] = assign_to("n0")
    rig.core.answers[NodeLost] = lambda event: [Assign("r", "n1")]
    await rig.handle(await rig.accept("r"), NodeGone("n0", "test"))
    assert await rig.ledger.unfinished("n0") == []
    assert [item.task_id for item in await rig.ledger.unfinished("n1")] == ["r"]
    assert await rig.ledger.read_global(count=1, block_s=0) == []


async def test_a_node_brings_back_what_the_ledger_says_it_holds(rig: Rig) -> None:
    item = work_pb2.WorkItem(task_id="r", inference=work_pb2.InferenceWork(prompt_token_ids=[1]))
    await rig.ledger.submit(item)
    for held in (item, microbatch()):
        await rig.ledger.assign(held, "n0", entry_id=None, token=1)
    await rig.handle(NodeArrived(SPEC))
    kinds = [type(event) for event in rig.core.seen[:3]]
    assert kinds == [NodeJoined, TaskRecovered, TaskRecovered]
    assert rig.peers.told == [("assigned", "r", "n0"), ("held", 0, False)]


async def test_an_assignment_that_the_store_lost_is_made_again(rig: Rig) -> None:
    rig.core.answers[TaskArrived] = assign_to("n0")
    await rig.handle(await rig.accept("r"))
    await rig.ledger.take_back("n0", token=1)  # the store is back in the state before the assignment
    await rig.handle(NodeArrived(SPEC))
    assert rig.events(TaskEnded) == [TaskEnded("r", "n0", ok=False)]
    assert rig.driver.num_tasks == 0
    (delivery,) = await rig.ledger.read_global(count=9, block_s=0)
    await rig.handle(Delivered(delivery))
    assert [item.task_id for item in await rig.ledger.unfinished("n0")] == ["r"]


async def test_what_nobody_wants_any_more_is_cancelled_on_the_node_that_brings_it_back(rig: Rig) -> None:
    rig.peers.wanted.clear()
    await rig.ledger.assign(microbatch(), "n0", entry_id=None, token=1)
    await rig.handle(NodeArrived(SPEC))
    assert rig.events(TaskCancelled) == [TaskCancelled("j/0")]


async def test_what_a_lost_node_trained_and_was_to_train_waits_for_it_but_not_for_ever(rig: Rig) -> None:
    rig.core.answers[TaskArrived] = assign_to("n0")
    await rig.handle(Offered(microbatch(0)), Trained(trained(0)), Offered(microbatch(1)), await rig.accept("r"))
    await rig.handle(NodeGone("n0", "test", may_return=True))
    assert rig.events(NodeLost) == [NodeLost("n0", "test", keeps_training=True)]
    assert [item.task_id for item in await rig.ledger.unfinished("n0")] == ["j/0", "j/1"]
    assert (await rig.ledger.record("r")).state is TaskState.WAITING
    assert rig.peers.told[-1] == ("away", "n0", 30.0)
    rig.clock.advance(29.0)
    await rig.handle()
    assert len(await rig.ledger.unfinished("n0")) == 2
    rig.clock.advance(2.0)
    await rig.handle()
    assert await rig.ledger.unfinished("n0") == []
    assert rig.peers.told[-1] == ("away", "n0", 0.0)


async def test_a_node_that_is_back_in_time_and_still_measured_keeps_what_it_was_to_train(rig: Rig) -> None:
    rig.core.answers[TaskArrived] = assign_to("n0")
    await rig.handle(Offered(microbatch(0)), NodeGone("n0", "test", may_return=True))
    rig.peers.joining = ["n0"]
    rig.clock.advance(60.0)
    await rig.handle()
    assert len(await rig.ledger.unfinished("n0")) == 1
    rig.peers.joining = []
    rig.clock.advance(2.0)
    await rig.handle()
    assert await rig.ledger.unfinished("n0") == [], "it was not to be measured"


async def test_the_ledger_knows_whether_a_node_may_come_back_from_a_checkpoint(rig: Rig) -> None:
    rig.peers.keepers = {"n0"}
    rig.core.answers[TaskArrived] = lambda event: [Assign(event.task.task_id, "n" + event.task.task_id[-1])]
    await rig.handle(Offered(microbatch(0)), Offered(microbatch(1)))
    held = [item.node_keeps_checkpoints for node_id in ("n0", "n1") for item in await rig.ledger.unfinished(node_id)]
    assert held == [True, False]


async def test_a_node_that_is_back_in_time_has_what_it_was_to_train(rig: Rig) -> None:
    rig.core.answers[TaskArrived] = assign_to("n0")
    await rig.handle(Offered(microbatch(0)), Trained(trained(0)), Offered(microbatch(1)))
    await rig.handle(NodeGone("n0", "test", may_return=True), NodeArrived(SPEC))
    assert [event.task.task_id for event in rig.events(TaskRecovered)] == ["j/0", "j/1"]
    rig.clock.advance(60.0)
    await rig.handle()
    assert len(await rig.ledger.unfinished("n0")) == 2
    assert ("away", "n0", 0.0) not in rig.peers.told


@pytest.mark.parametrize("is_forgotten", [False, True])
@pytest.mark.parametrize("end", ["returns", "given up", "not waited for"])
async def test_the_ledger_tells_what_a_lost_node_ended_and_did_not_report(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, end: str, is_forgotten: bool
) -> None:
    """Of 0 it is known that it was trained, of 1 only that it was on the node; 2 has not ended."""
    rig.core.answers[TaskArrived] = assign_to("n0")
    await rig.handle(Offered(microbatch(0)), Trained(trained(0)), Offered(microbatch(1)), Offered(microbatch(2)))
    rig.peers.unsaved["n0"] = [trained(0)]
    for delivery in (await rig.ledger.read_node("n0", count=9, block_s=0))[:2]:
        assert await rig.ledger.finish("n0", delivery.entry_id, trained(delivery.item.training.sequence))
    if is_forgotten:

        async def record(task_id: str) -> TaskRecord | None:
            return None

        monkeypatch.setattr(rig.ledger, "record", record)
    await rig.handle(NodeGone("n0", "test", may_return=end != "not waited for"))
    rig.clock.advance(31.0 if end == "given up" else 0.0)
    await rig.handle(*[NodeArrived(SPEC)] if end == "returns" else [])
    outcomes = {told[1] for told in rig.peers.told if told[0] == "outcome"}
    # What is not waited for is assigned again, where the ledger refuses and tells.
    assert outcomes == ({0} if end == "not waited for" else {0, 1})
    # A result that nobody knows ends the job; that 0 was trained is known.
    assert len(rig.events(JobCancelled)) == (1 if is_forgotten and 1 in outcomes else 0)
