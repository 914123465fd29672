"""Training jobs: found in memory or in the ledger, and durable there.

Progress is stored up to the first micro-batch that is not trained yet (`next_sequence`); what ran ahead of it is kept
in memory and, after a restart, found again in the ledger's outcomes. So a restart trains nothing twice while outcomes
are kept (`result_ttl_s`), and after that the micro-batches between at least once.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.runtime.clock import Clock
from services.scheduler.guard import LedgerGuard
from services.scheduler.job_state import JobState

_MAX_LISTED = 100


class JobRegistry:
    """Every job that runs; ended ones are in the ledger."""

    def __init__(self, *, guard: LedgerGuard, clock: Clock, save_interval_s: float) -> None:
        self._guard = guard
        self._ledger = guard.ledger
        self._clock = clock
        self._save_interval_s = save_interval_s
        #: Those that are paused included.
        self._running: dict[str, JobState] = {}
        #: Ended, and not stored as such yet.
        self._ending: dict[str, JobState] = {}
        #: Set when the feeder may have something to do.
        self.fed = asyncio.Event()
        self._unsaved = asyncio.Event()
        #: One save at a time: an older record must not overwrite a newer one.
        self._saving = asyncio.Lock()

    # ------------------------------------------------------------- those that run

    def running(self) -> list[JobState]:
        """Jobs that have not ended, oldest first."""
        return list(self._running.values())

    def running_job(self, job_id: str) -> JobState | None:
        """The job if it has not ended."""
        return self._running.get(job_id)

    def num_paused(self) -> int:
        """Jobs that wait for their owner."""
        return sum(state.paused for state in self._running.values())

    def num_waiting(self) -> int:
        """Micro-batches offered that no node has."""
        return sum(len(state.microbatches.waiting) for state in self._running.values())

    def put_running(self, state: JobState) -> None:
        """It runs, or goes on after its end."""
        self._ending.pop(state.job_id, None)
        self._running[state.job_id] = state

    def put_ending(self, state: JobState) -> None:
        """It has ended, and is kept until that is stored."""
        self._running.pop(state.job_id, None)
        self._ending[state.job_id] = state

    def changed(self) -> None:
        """There may be something to offer and something to store."""
        self.fed.set()
        self._unsaved.set()

    def announce(self, job_ids: Iterable[str], level: str, message: str) -> None:
        """Tell the owners of these running jobs, or of all when none is named."""
        wanted = set(job_ids)
        for state in self._running.values():
            if not wanted or state.job_id in wanted:
                state.add_event(level, message)
        self._unsaved.set()

    def note(self, state: JobState, level: str, message: str) -> None:
        """Tell a job's owner something, also when the job has ended meanwhile."""
        state = self.known(state.job_id) or state
        state.add_event(level, message)
        if state.ended:
            self.put_ending(state)
        self._unsaved.set()

    # ------------------------------------------------------------- found

    def known(self, job_id: str) -> JobState | None:
        """The job if it runs, or has just ended."""
        return self._running.get(job_id) or self._ending.get(job_id)

    async def state_of(self, job_id: str) -> JobState:
        """A job with its events, from the ledger when it has ended. Raises NOT_FOUND, UNAVAILABLE."""
        known = self.known(job_id)
        if known is not None:
            return known
        stored = await self.stored(job_id)
        if stored is None:
            raise LemixError(ErrorCode.NOT_FOUND, f"no job {job_id[:200]!r}", param="job_id")
        return stored

    async def find(self, job_id: str) -> types_pb2.TrainingJob | None:
        """One job; None: there is none. Raises UNAVAILABLE."""
        state = self.known(job_id) or await self.stored(job_id)
        return None if state is None else state.view()

    async def stored(self, job_id: str) -> JobState | None:
        """A job with its events from the ledger; None: there is none. Raises UNAVAILABLE."""
        record = await self._guard.once(lambda: self._ledger.get_job(job_id))
        if record is None:
            return None
        state = JobState(record, self._clock)
        state.events.restore(await self._guard.once(lambda: self._ledger.read_job_events(job_id)))
        return self.known(job_id) or state  # another call may have taken it up meanwhile

    async def gated(self, job_id: str) -> JobState | None:
        """A job with what was measured on its held-out examples, also an ended one. Raises UNAVAILABLE."""
        known = self.known(job_id)
        if known is not None:
            return known
        record = await self._guard.once(lambda: self._ledger.get_job(job_id))
        return None if record is None else JobState(record, self._clock)

    async def newest(self, limit: int) -> list[types_pb2.TrainingJob]:
        """The newest jobs first, at most `limit` (1 to 100). Raises UNAVAILABLE."""
        records = await self._guard.once(lambda: self._ledger.newest_jobs(min(max(1, limit), _MAX_LISTED)))
        return [(self.known(record.job.job_id) or JobState(record, self._clock)).view() for record in records]

    async def get_file(self, file_id: str, *, param: str) -> work_pb2.FileRecord:
        """A stored file, which this field of a request names. Raises NOT_FOUND, UNAVAILABLE."""
        file = await self._guard.once(lambda: self._ledger.get_file(file_id))
        if file is None:
            raise LemixError(ErrorCode.NOT_FOUND, f"no file {file_id[:200]!r}", param=param)
        return file

    # ------------------------------------------------------------- stored

    async def left_running(self) -> AsyncGenerator[JobState]:
        """The jobs that a predecessor left running, oldest first."""
        for record in await self._guard.until_done(self._ledger.list_jobs):
            state = JobState(record, self._clock, resumed=True)
            if not state.ended and state.job_id not in self._running:
                await self._read_history(state)
                yield state

    async def _read_history(self, state: JobState) -> None:
        state.events.restore(await self._guard.until_done(lambda: self._ledger.read_job_events(state.job_id)))
        if state.endless:
            file = await self._guard.until_done(lambda: self._ledger.get_file(state.file_id))
            state.grow(0 if file is None else file.num_examples)

    async def check_ledger(self) -> None:
        """Raises UNAVAILABLE when nothing can be stored now."""
        if not self._guard.available:
            await self._guard.once(self._ledger.ping)

    async def run_saver(self) -> None:
        """Store progress at a bounded rate until cancelled."""
        while True:
            await self._unsaved.wait()
            self._unsaved.clear()
            await self._guard.until_done(self.save)
            await asyncio.sleep(self._save_interval_s)

    async def save(self) -> None:
        """Store everything that changed. Raises LedgerUnavailable; call it again then."""
        async with self._saving:
            for state in [*self._running.values(), *self._ending.values()]:
                if state.dirty:
                    await self._store(state)
                if state.ended and not state.dirty:  # it may have ended while what came before was being stored
                    self._ending.pop(state.job_id, None)

    async def _store(self, state: JobState) -> None:
        events = state.events.unsaved()
        record = state.durable_record()
        state.dirty = False
        try:
            await self._ledger.append_job_events(state.job_id, events)
            state.events.saved(len(events))
            await self._ledger.put_job(record)
        except BaseException:
            state.dirty = True
            raise
