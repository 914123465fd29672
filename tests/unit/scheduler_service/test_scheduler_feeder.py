"""The feeder reads many micro-batches at once and tops the look-ahead up when half of it is gone."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from lemix.internal.v1 import work_pb2
from lemix.v1 import training_service_pb2, types_pb2
from services.ledger.memory import MemoryLedger, MemoryStore
from services.runtime.clock import FakeClock
from services.scheduler.feeder import Feeder
from services.scheduler.guard import LedgerGuard
from services.scheduler.inbox import Inbox, Offered, Told
from services.scheduler.training import Training

LOOK_AHEAD = 8


class CountingLedger(MemoryLedger):
    """Notes how many examples each read asks for."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        super().__init__(self.store, result_ttl_s=60.0, retention_s=60.0)
        self.reads: list[int] = []

    async def read_examples(self, file_id: str, positions: Sequence[int]) -> list[work_pb2.TrainingExample]:
        """Read, and note it."""
        self.reads.append(len(positions))
        return await super().read_examples(file_id, positions)


class Fed:
    """A registry, its feeder, and what came out."""

    def __init__(self) -> None:
        self.ledger = CountingLedger()
        guard = LedgerGuard(self.ledger)
        self.inbox = Inbox(1024)
        self.training = Training(
            guard=guard,
            inbox=self.inbox,
            clock=FakeClock(),
            max_running=4,
            max_paused=4,
            max_feedback_backlog=4,
            derive_sync_interval=False,
            feedback_learning_rate=2e-3,
            save_interval_s=0.01,
        )
        self.feeder = Feeder(
            jobs=self.training.jobs,
            lifecycle=self.training.lifecycle,
            guard=guard,
            inbox=self.inbox,
            look_ahead=LOOK_AHEAD,
        )

    async def job(self, num_examples: int, *, stored: int | None = None, batch_size: int = 1) -> str:
        """A new job; of its examples so many are stored."""
        file_id = f"f-{len(self.ledger.reads)}-{len(self.training.jobs.running())}"
        examples = [work_pb2.TrainingExample(token_ids=[number, 1]) for number in range(num_examples)]
        await self.ledger.put_file(work_pb2.FileRecord(file_id=file_id), examples)
        request = training_service_pb2.CreateJobRequest(
            training_file=file_id, hyperparameters=types_pb2.Hyperparameters(batch_size=batch_size, num_epochs=1)
        )
        created = await self.training.calls.create(request, {"m"})
        if stored is not None:
            del self.ledger.store.examples[file_id][stored:]
        return created.job_id

    async def offers(self) -> list[work_pb2.TrainingWork]:
        """What was offered since the last call, once the feeder waits."""
        for _ in range(200):
            await asyncio.sleep(0)
        found: list[work_pb2.TrainingWork] = []
        while (message := await self.inbox.get(0.0)) is not None:
            if isinstance(message, Offered):
                found.append(message.item.training)
            else:
                assert isinstance(message, Told)
        return found

    def placed(self, works: list[work_pb2.TrainingWork]) -> None:
        """Nodes took these."""
        for work in works:
            self.training.progress.on_held(work, waiting=False)


@asynccontextmanager
async def feeding() -> AsyncIterator[Fed]:
    """A feeder that runs."""
    fed = Fed()
    running = asyncio.create_task(fed.feeder.run())
    try:
        yield fed
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_one_read_serves_many_micro_batches() -> None:
    async with feeding() as fed:
        await fed.job(100)
        first = await fed.offers()
        assert [work.sequence for work in first] == list(range(LOOK_AHEAD))
        assert fed.ledger.reads == [LOOK_AHEAD]
        assert all(len(work.examples) == 1 for work in first)


async def test_the_look_ahead_is_topped_up_when_half_of_it_is_gone() -> None:
    async with feeding() as fed:
        await fed.job(100)
        first = await fed.offers()
        fed.placed(first[:3])
        assert await fed.offers() == []
        fed.placed(first[3:4])
        assert [work.sequence for work in await fed.offers()] == [8, 9, 10, 11]
        assert fed.ledger.reads == [8, 4]


async def test_jobs_take_turns_whatever_is_read_together() -> None:
    async with feeding() as fed:
        await asyncio.gather(fed.job(3), fed.job(2, batch_size=2))
        offered = [(work.job_id, work.sequence, len(work.examples)) for work in await fed.offers()]
        long_job = next(job_id for job_id, _, size in offered if size == 1)
        assert [sequence for job_id, sequence, _ in offered if job_id == long_job] == [0, 1, 2]
        assert [job_id for job_id, _, _ in offered].index(long_job) < 2
        assert len(offered) == 4
        assert [size for _, _, size in offered].index(2) < 2


async def test_large_micro_batches_are_read_a_few_at_a_time() -> None:
    async with feeding() as fed:
        await fed.job(400, batch_size=100)
        assert [len(work.examples) for work in await fed.offers()] == [100] * 4
        assert fed.ledger.reads == [200, 200]


async def test_a_job_whose_file_has_lost_examples_fails_alone() -> None:
    async with feeding() as fed:
        lost, whole = await fed.job(4, stored=1), await fed.job(4)
        assert {work.job_id for work in await fed.offers()} == {whole}
        assert (await fed.training.calls.get(lost)).status == types_pb2.JOB_STATUS_FAILED
