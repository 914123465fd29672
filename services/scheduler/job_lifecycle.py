"""How jobs begin, pause, go on and end."""

import structlog

from lemix.errors import LemixError
from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.runtime.clock import Clock
from services.scheduler.adapters import AdapterDesk
from services.scheduler.checkpoints import CheckpointDesk
from services.scheduler.core.events import Event, JobCancelled, JobEnded, JobPaused, JobResumed, SyncIntervalSet
from services.scheduler.guard import LedgerGuard
from services.scheduler.inbox import Inbox, Told
from services.scheduler.job_state import JobState
from services.scheduler.jobs import JobRegistry
from services.scheduler.refusals import overloaded

_log = structlog.get_logger()


class JobLifecycle:
    """Changes jobs, and tells the core and the ledger."""

    def __init__(
        self,
        *,
        jobs: JobRegistry,
        guard: LedgerGuard,
        inbox: Inbox,
        clock: Clock,
        checkpoints: CheckpointDesk,
        adapters: AdapterDesk,
        max_running: int,
        derive_sync_interval: bool,
    ) -> None:
        self._jobs = jobs
        self._guard = guard
        self._inbox = inbox
        self._clock = clock
        self._checkpoints = checkpoints
        self._adapters = adapters
        self._max_running = max_running
        self._derive_sync_interval = derive_sync_interval

    # ------------------------------------------------------------- begun

    async def resume(self) -> None:
        """Take up the jobs that a predecessor left running."""
        newest: JobState | None = None
        async for state in self._jobs.left_running():
            goes_on = "it stays paused" if state.paused else "the job goes on"
            state.add_event("info", f"the scheduler has restarted; {goes_on}")
            self._jobs.put_running(state)
            if state.paused:
                await self._inbox.put(Told(JobPaused(state.job_id)))
            else:
                newest = state
        if self._jobs.running():
            _log.info("jobs resumed", jobs=len(self._jobs.running()))
        if newest is not None:
            await self._set_sync_interval(newest)
        self._jobs.changed()

    def check_room(self) -> None:
        """Raises OVERLOADED when no further job may run."""
        if len(self._jobs.running()) - self._jobs.num_paused() >= self._max_running:
            raise overloaded(f"{self._max_running} jobs are running already")

    async def start(self, record: work_pb2.JobRecord) -> JobState:
        """Store a new job and begin with it. Raises UNAVAILABLE."""
        stored = await self._guard.once(lambda: self._guard.ledger.put_job(record))
        known = self._jobs.running_job(stored.job.job_id)
        if known is not None:
            return known  # the same request made it before
        state = JobState(stored, self._clock)
        if stored.job.job_id != record.job.job_id:
            return state
        self._jobs.put_running(state)
        state.add_event("info", "the job was accepted")
        await self._set_sync_interval(state)
        self._jobs.changed()
        return state

    async def _set_sync_interval(self, state: JobState) -> None:
        if self._derive_sync_interval:
            steps = max(1, min(100, state.num_examples // 2))
            await self._inbox.put(Told(SyncIntervalSet(steps)))

    # ------------------------------------------------------------- paused, and going on

    async def pause(self, state: JobState) -> None:
        """Offer no more of this running job; what no node holds comes back. Raises UNAVAILABLE."""
        state.pause()
        self._checkpoints.ask_to_save(state)
        await self._inbox.put(Told(JobPaused(state.job_id)))
        await self._guard.once(self._jobs.save)

    async def go_on(self, state: JobState) -> None:
        """Offer again of this job, which is paused or has ended and is stored. Raises UNAVAILABLE."""
        state.go_on()
        self._jobs.put_running(state)
        await self._inbox.put(Told(JobResumed(state.job_id)))
        await self._set_sync_interval(state)
        self._jobs.changed()
        await self._guard.once(self._jobs.save)

    # ------------------------------------------------------------- ended

    async def cancel(self, state: JobState) -> None:
        """End this running job because its owner asks for it. Raises UNAVAILABLE."""
        await self._jobs.check_ledger()
        self._end(state, types_pb2.JOB_STATUS_CANCELLED, "info", "the job was cancelled")
        await self._inbox.put(Told(JobCancelled(state.job_id)))
        await self._guard.once(self._jobs.save)

    async def fail(self, state: JobState, error: LemixError) -> None:
        """End a job that cannot go on."""
        if not state.ended:
            for event in self.fail_now(state, error):
                await self._inbox.put(Told(event))

    def fail_now(self, state: JobState, error: LemixError) -> list[Event]:
        """End a job that cannot go on. Returns what the core must hear."""
        state.set_error(error)
        self._end(state, types_pb2.JOB_STATUS_FAILED, "error", f"the job failed: {error.message}")
        return [JobCancelled(state.job_id)]

    def succeed(self, state: JobState) -> list[Event]:
        """Everything is trained. Returns what the core must hear."""
        self._end(state, types_pb2.JOB_STATUS_SUCCEEDED, "info", "the job has succeeded")
        return [JobEnded(state.job_id)]

    def _end(self, state: JobState, status: types_pb2.JobStatus, level: str, message: str) -> None:
        state.end(status, level, message)
        if status != types_pb2.JOB_STATUS_SUCCEEDED and state.unserve():
            self._adapters.free(state.job_id)
        self._jobs.put_ending(state)
        _log.info("job ended", job=state.job_id, status=types_pb2.JobStatus.Name(status), reason=message)
        self._jobs.changed()
