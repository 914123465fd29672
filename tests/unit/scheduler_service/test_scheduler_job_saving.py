"""The registry of jobs stores progress without overtaking itself."""

import asyncio
from collections.abc import Sequence

from lemix.internal.v1 import work_pb2
from lemix.v1 import training_service_pb2, types_pb2
from services.ledger.memory import MemoryLedger, MemoryStore
from services.runtime.clock import FakeClock
from services.scheduler.guard import LedgerGuard
from services.scheduler.inbox import Inbox
from services.scheduler.jobs import JobRegistry


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


def registry(ledger: MemoryLedger) -> JobRegistry:
    """A registry over this ledger."""
    return JobRegistry(
        guard=LedgerGuard(ledger),
        inbox=Inbox(64),
        clock=FakeClock(),
        max_running=4,
        max_feedback_backlog=4,
        derive_sync_interval=False,
        feedback_learning_rate=2e-3,
        save_interval_s=0.01,
    )


async def new_job(jobs: JobRegistry, ledger: MemoryLedger) -> str:
    """A job over a file of two examples."""
    examples = [work_pb2.TrainingExample(token_ids=[number, 1]) for number in range(2)]
    await ledger.put_file(work_pb2.FileRecord(file_id="f", num_examples=2), examples)
    created = await jobs.create(training_service_pb2.CreateJobRequest(training_file="f"), {"m"})
    return created.job_id


async def test_a_job_cancelled_while_it_is_being_stored_stays_cancelled() -> None:
    ledger = SlowLedger()
    jobs = registry(ledger)
    job_id = await new_job(jobs, ledger)
    saving = asyncio.create_task(jobs.save())
    await ledger.appending.wait()
    cancelling = asyncio.create_task(jobs.cancel(job_id))
    for _ in range(20):
        await asyncio.sleep(0)  # as far as it gets
    ledger.go.set()
    async with asyncio.timeout(5):
        await asyncio.gather(saving, cancelling)
    stored = await ledger.get_job(job_id)
    assert stored is not None
    assert stored.job.status == types_pb2.JOB_STATUS_CANCELLED
    assert [event.sequence for event in await ledger.read_job_events(job_id)] == [1, 2]
