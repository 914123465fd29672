"""The driver with a scripted core and the ledger in memory."""

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.internal.v1 import work_pb2
from lemix.v1 import errors_pb2, types_pb2
from services.latency import LatencyModel, NodeLatency, OpKind
from services.ledger import Delivery, Ledger, LedgerUnavailable, StaleToken, TaskState, open_ledger
from services.runtime.clock import FakeClock
from services.scheduler.adapters import AdapterDesk
from services.scheduler.core.types import (
    ApplyWeights,
    Assign,
    CancelOnNode,
    Command,
    Drop,
    Event,
    JobCancelled,
    NodeJoined,
    NodeLost,
    NodeSpec,
    OpFinished,
    Reject,
    SyncEnded,
    SyncMode,
    TakeSnapshot,
    TaskArrived,
    TaskCancelled,
    TaskEnded,
    TaskRecovered,
    Tick,
)
from services.scheduler.driver import Driver
from services.scheduler.guard import LedgerGuard
from services.scheduler.inbox import (
    CancelRequested,
    Delivered,
    Ended,
    Inbox,
    Message,
    NodeArrived,
    NodeGone,
    Offered,
    Told,
    Traced,
    Trained,
)

LATENCY = NodeLatency(({OpKind.PREFILL: LatencyModel("constant", (0.1,))},))
SPEC = NodeSpec("n0", 1, LATENCY)


class ScriptedCore:
    """Answers each type of event as told; remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[Event] = []
        self.answers: dict[type, Callable[[Any], list[Command]]] = {}
        self.wakeup_s: float | None = None

    def step(self, now_s: float, event: Event) -> list[Command]:
        self.seen.append(event)
        if isinstance(event, Tick):
            self.wakeup_s = None
        answer = self.answers.get(type(event))
        return answer(event) if answer is not None else []

    def next_wakeup_s(self) -> float | None:
        return self.wakeup_s

    def snapshot(self) -> Any:
        raise AssertionError("not asked in these tests")


@dataclass
class Peers:
    """What gateways, nodes and jobs were told."""

    told: list[tuple[Any, ...]] = field(default_factory=list)
    connected: set[str] = field(default_factory=lambda: {"n0", "n1"})
    wanted: set[str] = field(default_factory=lambda: {"j"})
    adapters: AdapterDesk = field(default_factory=AdapterDesk)
    joining: list[str] = field(default_factory=list)
    keepers: set[str] = field(default_factory=set)

    def send(self, node_id: str, message: pb.NodeSessionResponse) -> bool:
        if node_id in self.connected:
            self.told.append((node_id, message.WhichOneof("message")))
        return node_id in self.connected

    def keeps_checkpoints(self, node_id: str) -> bool:
        return node_id in self.keepers

    def address(self, node_id: str) -> str:
        return f"{node_id}:1" if node_id in self.connected else ""

    def assigned(self, request_id: str, node_id: str) -> None:
        self.told.append(("assigned", request_id, node_id))

    def rejected(self, request_id: str, error: LemixError) -> None:
        self.told.append(("rejected", request_id, error.code))

    def finished(self, request_id: str, outcome: work_pb2.InferenceOutcome) -> None:
        self.told.append(("finished", request_id, outcome.error.code if outcome.HasField("error") else 0))

    def is_wanted(self, job_id: str) -> bool:
        return job_id in self.wanted

    def on_held(self, work: work_pb2.TrainingWork, *, waiting: bool) -> None:
        self.told.append(("held", work.sequence, waiting))

    def on_refused(self, work: work_pb2.TrainingWork, error: LemixError) -> list[Event]:
        self.told.append(("refused", work.sequence, error.code))
        return []

    def on_outcome(self, outcome: work_pb2.WorkOutcome) -> list[Event]:
        self.told.append(("outcome", outcome.training.sequence))
        return [JobCancelled("j")] if outcome.training.HasField("error") else []

    def on_trained(self, outcome: work_pb2.WorkOutcome) -> None:
        self.told.append(("trained", outcome.training.sequence))

    def on_node_away(self, node_id: str, wait_s: float) -> None:
        self.told.append(("away", node_id, wait_s))


class Rig:
    """A driver and everything around it."""

    def __init__(self, ledger: Ledger) -> None:
        self.core, self.peers, self.clock, self.ledger = ScriptedCore(), Peers(), FakeClock(100.0), ledger
        self.inbox = Inbox(64)
        self.driver = Driver(
            core=self.core,
            inbox=self.inbox,
            guard=LedgerGuard(ledger),
            nodes=self.peers,  # type: ignore[arg-type]
            gateways=self.peers,  # type: ignore[arg-type]
            jobs=self.peers,
            clock=self.clock,
            node_return_s=30.0,
        )

    async def lead(self) -> "Rig":
        self.driver.lead(await self.ledger.acquire_leadership())
        return self

    async def handle(self, *messages: Message) -> None:
        """Let the driver take these and fall idle."""
        done = asyncio.Event()

        class _Last(Exception):
            pass

        for message in messages:
            await self.inbox.put(message)
        await self.inbox.put(Told(Tick()))
        self.core.answers.setdefault(Tick, lambda event: done.set() or [])
        running = asyncio.create_task(self.driver.run())
        finished = asyncio.create_task(done.wait())
        await asyncio.wait({running, finished}, return_when=asyncio.FIRST_COMPLETED, timeout=5.0)
        self.core.answers.pop(Tick)
        finished.cancel()
        if running.done():
            await running
        running.cancel()
        await asyncio.gather(running, finished, return_exceptions=True)

    async def accept(self, task_id: str, **fields: Any) -> Delivered:
        """Submit a request and read it."""
        work = work_pb2.InferenceWork(prompt_token_ids=[1], **fields)
        await self.ledger.submit(work_pb2.WorkItem(task_id=task_id, inference=work))
        (delivery,) = await self.ledger.read_global(count=9, block_s=0)
        return Delivered(delivery)

    def events(self, kind: type) -> list[Any]:
        return [event for event in self.core.seen if isinstance(event, kind)]


@pytest.fixture
async def rig() -> Rig:
    return await Rig(await open_ledger(f"memory://{uuid.uuid4().hex}")).lead()


def microbatch(sequence: int = 0) -> work_pb2.WorkItem:
    work = work_pb2.TrainingWork(job_id="j", sequence=sequence, examples=[work_pb2.TrainingExample(token_ids=[1, 2])])
    return work_pb2.WorkItem(task_id=f"j/{sequence}", training=work)


def served(task_id: str, node_id: str = "n0") -> work_pb2.WorkOutcome:
    inference = work_pb2.InferenceOutcome(finish_reason=types_pb2.FINISH_REASON_STOP, token_ids=[4])
    return work_pb2.WorkOutcome(task_id=task_id, node_id=node_id, inference=inference)


def assign_to(node_id: str) -> Callable[[TaskArrived], list[Command]]:
    return lambda event: [Assign(event.task.task_id, node_id)]


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


async def test_an_assignment_is_in_the_ledger_before_the_gateway_hears(rig: Rig) -> None:
    rig.core.answers[TaskArrived] = assign_to("n0")
    await rig.handle(await rig.accept("r"))
    (item,) = await rig.ledger.unfinished("n0")
    assert (item.task_id, item.fencing_token) == ("r", 1)
    assert rig.peers.told == [("assigned", "r", "n0")]


async def test_a_repeated_delivery_is_one_task(rig: Rig) -> None:
    delivered = await rig.accept("r")
    await rig.handle(delivered, delivered)
    assert len(rig.events(TaskArrived)) == 1


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


def trained(sequence: int, node_id: str = "n0") -> work_pb2.WorkOutcome:
    training = work_pb2.TrainingOutcome(job_id="j", sequence=sequence, weight_step=sequence + 1)
    return work_pb2.WorkOutcome(task_id=f"j/{sequence}", node_id=node_id, training=training)


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
