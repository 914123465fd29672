"""A driver with a scripted core, the ledger in memory, and a record of what everybody else was told."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lemix.errors import LemixError
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.latency import LatencyModel, NodeLatency, OpKind
from services.ledger import Ledger
from services.runtime.clock import FakeClock
from services.scheduler.adapters import AdapterDesk
from services.scheduler.checkpoints import CheckpointDesk
from services.scheduler.core.commands import Assign, Command
from services.scheduler.core.events import Event, JobCancelled, TaskArrived, Tick
from services.scheduler.core.node_spec import NodeSpec
from services.scheduler.driver import Driver
from services.scheduler.failover import Failover
from services.scheduler.guard import LedgerGuard
from services.scheduler.inbox import (
    Delivered,
    Inbox,
    Message,
    Told,
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

    def op_records(self) -> Any:
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
    unsaved: dict[str, list[work_pb2.WorkOutcome]] = field(default_factory=dict)

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

    def is_wanted(self, item: work_pb2.WorkItem) -> bool:
        return item.training.job_id in self.wanted

    def on_taken_back(self, item: work_pb2.WorkItem) -> None:
        self.told.append(("taken back", item.training.sequence))

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

    def unsaved_on(self, node_id: str) -> list[work_pb2.WorkOutcome]:
        return self.unsaved.get(node_id, [])

    def on_node_away(self, node_id: str, wait_s: float, failover: str = "") -> None:
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
            failover=Failover(CheckpointDesk(), on=False),
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


def microbatch(sequence: int = 0) -> work_pb2.WorkItem:
    work = work_pb2.TrainingWork(job_id="j", sequence=sequence, examples=[work_pb2.TrainingExample(token_ids=[1, 2])])
    return work_pb2.WorkItem(task_id=f"j/{sequence}", training=work)


def served(task_id: str, node_id: str = "n0") -> work_pb2.WorkOutcome:
    inference = work_pb2.InferenceOutcome(finish_reason=types_pb2.FINISH_REASON_STOP, token_ids=[4])
    return work_pb2.WorkOutcome(task_id=task_id, node_id=node_id, inference=inference)


def assign_to(node_id: str) -> Callable[[TaskArrived], list[Command]]:
    return lambda event: [Assign(event.task.task_id, node_id)]


def trained(sequence: int, node_id: str = "n0") -> work_pb2.WorkOutcome:
    training = work_pb2.TrainingOutcome(job_id="j", sequence=sequence, weight_step=sequence + 1)
    return work_pb2.WorkOutcome(task_id=f"j/{sequence}", node_id=node_id, training=training)
