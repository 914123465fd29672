"""The registry of jobs stores progress without overtaking itself."""

import asyncio
from collections.abc import Sequence

import pytest

from lemix.errors import LemixError
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.internal.v1 import work_pb2
from lemix.v1 import training_service_pb2, types_pb2
from services.ledger.memory import MemoryLedger, MemoryStore
from services.runtime.clock import FakeClock
from services.scheduler.checkpoints import CheckpointDesk
from services.scheduler.core.events import JobEnded
from services.scheduler.guard import LedgerGuard
from services.scheduler.inbox import Inbox
from services.scheduler.microbatches import WINDOW
from services.scheduler.training import Training


class SlowLedger(MemoryLedger):
    """Its first append of events waits for `go`."""

    def __init__(self) -> None:
        super().__init__(MemoryStore(), result_ttl_s=60.0, retention_s=60.0)
        self.appending, self.go = asyncio.Event(), asyncio.Event()

    async def append_job_events(self, job_id: str, events: Sequence[types_pb2.JobEvent]) -> None:
        """Append, the first time late."""
        if not self.appending.is_set():
            self.appending.set()
            await self.go.wait()
        await super().append_job_events(job_id, events)


def training(ledger: MemoryLedger, desk: CheckpointDesk | None = None) -> Training:
    """Training jobs over this ledger."""
    return Training(
        guard=LedgerGuard(ledger),
        inbox=Inbox(64),
        clock=FakeClock(),
        max_running=4,
        max_paused=4,
        max_feedback_backlog=4,
        derive_sync_interval=False,
        feedback_learning_rate=2e-3,
        save_interval_s=0.01,
        checkpoints=desk,
    )


async def new_job(made: Training, ledger: MemoryLedger, num_examples: int = 2) -> str:
    """A job over a file of so many examples, one in a micro-batch."""
    examples = [work_pb2.TrainingExample(token_ids=[number, 1]) for number in range(num_examples)]
    await ledger.put_file(work_pb2.FileRecord(file_id="f", num_examples=num_examples), examples)
    request = training_service_pb2.CreateJobRequest(
        training_file="f", hyperparameters=types_pb2.Hyperparameters(batch_size=1, num_epochs=1)
    )
    return (await made.calls.create(request, {"m"})).job_id


class Saves:
    """A registry whose nodes are asked to save, and who was asked why."""

    def __init__(self) -> None:
        self.ledger = MemoryLedger(MemoryStore(), result_ttl_s=60.0, retention_s=60.0)
        self.desk = CheckpointDesk()
        self.desk.send = self._send
        self.asked: list[tuple[str, str]] = []
        self.training = training(self.ledger, self.desk)

    def _send(self, node_id: str, message: pb.NodeSessionResponse) -> bool:
        self.asked.append((node_id, message.checkpoint.save))
        return True

    def tell(self, job_id: str, sequence: int, node_id: str, *, saved: bool) -> None:
        """A node trained a micro-batch; saved: for good."""
        training = work_pb2.TrainingOutcome(job_id=job_id, sequence=sequence, loss=1.0, weight_step=1)
        outcome = work_pb2.WorkOutcome(task_id=f"{job_id}/{sequence}", node_id=node_id, training=training)
        if saved:
            told = self.training.progress.on_outcome(outcome)
            assert told == (
                [] if job_id in {state.job_id for state in self.training.jobs.running()} else [JobEnded(job_id)]
            )
        else:
            self.training.progress.on_trained(outcome)


async def test_the_last_micro_batch_on_a_node_without_checkpoints_asks_the_others_to_save() -> None:
    made = Saves()
    job_id = await new_job(made.training, made.ledger, 4)
    made.tell(job_id, 0, "a", saved=False)
    made.tell(job_id, 1, "a", saved=False)
    made.tell(job_id, 2, "b", saved=False)
    assert made.asked == []
    made.tell(job_id, 3, "c", saved=True)
    assert made.asked == [("a", "job_end"), ("b", "job_end")]
    made.tell(job_id, 0, "a", saved=True)
    made.tell(job_id, 1, "a", saved=True)
    assert len(made.asked) == 2, "what a checkpoint brings asks for none"
    made.tell(job_id, 2, "b", saved=True)
    assert (await made.training.calls.get(job_id)).status == types_pb2.JOB_STATUS_SUCCEEDED


async def test_a_job_does_not_stand_still_behind_a_micro_batch_that_no_checkpoint_contains() -> None:
    made = Saves()
    job_id = await new_job(made.training, made.ledger, WINDOW + 2)
    (state,) = made.training.jobs.running()
    made.tell(job_id, 0, "slow", saved=False)
    while (sequence := state.take_offer()) is not None:
        made.tell(job_id, sequence, "fast", saved=True)
    assert made.asked == [("slow", "interval")]
    made.tell(job_id, 0, "slow", saved=True)
    assert [state.take_offer(), state.take_offer(), state.take_offer()] == [WINDOW, WINDOW + 1, None]


async def test_a_job_cancelled_while_it_is_being_stored_stays_cancelled() -> None:
    ledger = SlowLedger()
    made = training(ledger)
    job_id = await new_job(made, ledger)
    saving = asyncio.create_task(made.jobs.save())
    await ledger.appending.wait()
    cancelling = asyncio.create_task(made.calls.cancel(job_id))
    for _ in range(20):
        await asyncio.sleep(0)  # as far as it gets
    ledger.go.set()
    async with asyncio.timeout(5):
        await asyncio.gather(saving, cancelling)
    stored = await ledger.get_job(job_id)
    assert stored is not None
    assert stored.job.status == types_pb2.JOB_STATUS_CANCELLED
    assert [event.sequence for event in await ledger.read_job_events(job_id)] == [1, 2]


async def test_a_model_whose_job_has_expired_can_be_deleted() -> None:
    """It is listed and takes a place on its node until then."""
    made = training(MemoryLedger(MemoryStore(), result_ttl_s=60.0, retention_s=60.0))
    freed: list[tuple[str, str]] = []
    made.adapters.send = lambda node_id, message: freed.append((node_id, message.forget_adapter.adapter_id)) is None
    made.adapters.joined("a", "m")
    await made.adapters.told("a", [pb.HeldAdapter(adapter_id="old", isolated=True)])
    assert [model.id for model in made.adapters.models()] == ["m:old"]
    await made.calls.delete_model("m:old")
    assert freed == [("a", "old")]
    with pytest.raises(LemixError, match="there is no model"):
        await made.calls.delete_model("m:unknown")
