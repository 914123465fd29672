"""Training jobs: created, followed, ended, and durable in the ledger.

Progress is stored up to the first micro-batch that is not trained yet (`next_sequence`); what ran ahead of it is kept
in memory and, after a restart, found again in the ledger's outcomes. So a restart trains nothing twice while outcomes
are kept (`result_ttl_s`), and after that the micro-batches between at least once.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Iterable

import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import work_pb2
from lemix.v1 import training_service_pb2, types_pb2
from services.runtime.clock import Clock
from services.scheduler import metrics
from services.scheduler.adapters import AdapterDesk
from services.scheduler.checkpoints import CheckpointDesk
from services.scheduler.core.events import Event, JobCancelled, JobEnded, JobPaused, JobResumed, SyncIntervalSet
from services.scheduler.guard import LedgerGuard
from services.scheduler.hyperparameters import resolve
from services.scheduler.inbox import Inbox, Told
from services.scheduler.job_request import new_job
from services.scheduler.job_state import JobState

_log = structlog.get_logger()

_MAX_LISTED = 100
_RETRY_AFTER_S = 1.0


class JobRegistry:
    """Every job that runs; ended ones are in the ledger."""

    def __init__(
        self,
        *,
        guard: LedgerGuard,
        inbox: Inbox,
        clock: Clock,
        max_running: int,
        max_feedback_backlog: int,
        feedback_learning_rate: float,
        derive_sync_interval: bool,
        save_interval_s: float,
        checkpoints: CheckpointDesk | None = None,
        adapters: AdapterDesk | None = None,
    ) -> None:
        self._guard = guard
        self._ledger = guard.ledger
        self._inbox = inbox
        self._clock = clock
        self._max_running = max_running
        self._max_feedback_backlog = max_feedback_backlog
        self._feedback_learning_rate = feedback_learning_rate
        self._derive_sync_interval = derive_sync_interval
        self._save_interval_s = save_interval_s
        self._checkpoints = checkpoints or CheckpointDesk()
        self.adapters = adapters or AdapterDesk()
        self.adapters.find_job = self.find
        self._checkpoints.announce = self.announce
        #: Those that are paused included.
        self._running: dict[str, JobState] = {}
        #: Ended, and not stored as such yet.
        self._ending: dict[str, JobState] = {}
        self._feedback_lock = asyncio.Lock()
        #: Set when the feeder may have something to do.
        self.fed = asyncio.Event()
        self._unsaved = asyncio.Event()
        #: One save at a time: an older record must not overwrite a newer one.
        self._saving = asyncio.Lock()
        self._closing = False

    # ------------------------------------------------------------- life of the registry

    async def resume(self) -> None:
        """Take up the jobs that a predecessor left running."""
        records = await self._guard.until_done(self._ledger.list_jobs)
        newest: JobState | None = None
        for record in records:
            state = JobState(record, self._clock, resumed=True)
            if state.ended or state.job_id in self._running:
                continue
            await self._read_history(state)
            goes_on = "it stays paused" if state.paused else "the job goes on"
            state.add_event("info", f"the scheduler has restarted; {goes_on}")
            self._running[state.job_id] = state
            if state.paused:
                await self._inbox.put(Told(JobPaused(state.job_id)))
            else:
                newest = state
        if self._running:
            _log.info("jobs resumed", jobs=len(self._running))
        if newest is not None:
            await self._set_sync_interval(newest)
        self._changed()

    async def _read_history(self, state: JobState) -> None:
        state.events.restore(await self._guard.until_done(lambda: self._ledger.read_job_events(state.job_id)))
        if state.endless:
            file = await self._guard.until_done(lambda: self._ledger.get_file(state.file_id))
            state.grow(0 if file is None else file.num_examples)

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

    def close(self) -> None:
        """End every watch because this scheduler stops."""
        self._closing = True
        for state in self._running.values():
            state.events.wake_watchers()

    # ------------------------------------------------------------- calls

    async def create(self, request: training_service_pb2.CreateJobRequest, models: set[str]) -> types_pb2.TrainingJob:
        """Make a durable job. Raises INVALID_REQUEST, NOT_FOUND, MODEL_NOT_FOUND, OVERLOADED, UNAVAILABLE."""
        if models and request.model and request.model not in models:
            raise LemixError(ErrorCode.MODEL_NOT_FOUND, f"no node serves model {request.model!r}", param="model")
        file = await self.get_file(request.training_file, param="training_file")
        job = new_job(request, file, created_unix_s=self._clock.unix_s())
        if request.validation_file:
            await self._check_validation(request.validation_file)
        self.check_room()
        state = await self._start(work_pb2.JobRecord(job=job, request_id=request.request_id))
        return state.view()

    def check_room(self) -> None:
        """Raises OVERLOADED when no further job may run."""
        if len(self._running) - self.num_paused() >= self._max_running:
            message = f"{self._max_running} jobs are running already"
            raise LemixError(ErrorCode.OVERLOADED, message, retry_after_s=_RETRY_AFTER_S)

    async def _start(self, record: work_pb2.JobRecord) -> JobState:
        stored = await self._guard.once(lambda: self._ledger.put_job(record))
        known = self._running.get(stored.job.job_id)
        if known is not None:
            return known  # the same request made it before
        state = JobState(stored, self._clock)
        if stored.job.job_id != record.job.job_id:
            return state
        self._running[state.job_id] = state
        state.add_event("info", "the job was accepted")
        await self._set_sync_interval(state)
        self._changed()
        return state

    async def _check_validation(self, file_id: str) -> None:
        file = await self._guard.once(lambda: self._ledger.get_file(file_id))
        if file is None or not file.num_examples:
            message = f"no file {file_id[:200]!r} with examples"
            raise LemixError(ErrorCode.NOT_FOUND, message, param="validation_file")
        if not self._checkpoints.keepers():
            message = "held-out examples are measured for checkpoints, and no connected node keeps any"
            raise LemixError(ErrorCode.INVALID_REQUEST, message, param="validation_file")

    async def get(self, job_id: str) -> types_pb2.TrainingJob:
        """One job. Raises NOT_FOUND, UNAVAILABLE."""
        return (await self.state_of(job_id)).view()

    async def newest(self, limit: int) -> list[types_pb2.TrainingJob]:
        """The newest jobs first, at most `limit` (1 to 100). Raises UNAVAILABLE."""
        records = await self._guard.once(lambda: self._ledger.newest_jobs(min(max(1, limit), _MAX_LISTED)))
        return [(self.known(record.job.job_id) or JobState(record, self._clock)).view() for record in records]

    async def cancel(self, job_id: str) -> types_pb2.TrainingJob:
        """Stop a job. Raises NOT_FOUND, CONFLICT when it has ended otherwise, UNAVAILABLE."""
        state = await self.state_of(job_id)
        if not state.ended:
            await self.check_ledger()
            self._end(state, types_pb2.JOB_STATUS_CANCELLED, "info", "the job was cancelled")
            await self._inbox.put(Told(JobCancelled(job_id)))
            await self._guard.once(self.save)
        elif state.status != types_pb2.JOB_STATUS_CANCELLED:
            raise LemixError(ErrorCode.CONFLICT, f"job {job_id} has ended already")
        return state.view()

    async def check_ledger(self) -> None:
        """Raises UNAVAILABLE when nothing can be stored now."""
        if not self._guard.available:
            await self._guard.once(self._ledger.ping)

    async def pause(self, state: JobState) -> None:
        """Offer no more of this running job; what no node holds comes back. Raises UNAVAILABLE."""
        state.pause()
        self._ask_to_save(state)
        await self._inbox.put(Told(JobPaused(state.job_id)))
        await self._guard.once(self.save)

    async def go_on(self, state: JobState) -> None:
        """Offer again of this job, which is paused or has ended and is stored. Raises UNAVAILABLE."""
        state.go_on()
        self._ending.pop(state.job_id, None)
        self._running[state.job_id] = state
        await self._inbox.put(Told(JobResumed(state.job_id)))
        await self._set_sync_interval(state)
        self._changed()
        await self._guard.once(self.save)

    async def delete_model(self, model: str) -> None:
        """Serve the adapter of an isolated job no longer. Raises MODEL_NOT_FOUND, CONFLICT (it trains), UNAVAILABLE."""
        job_id = model.rpartition(":")[2]
        state = self.known(job_id) or await self._stored(job_id)
        if state is None and self.adapters.free_held(job_id):
            return  # its job is not on record any more
        if state is None or not state.is_isolated:
            raise LemixError(ErrorCode.MODEL_NOT_FOUND, f"there is no model {model[:200]!r}", param="model")
        if not state.ended:
            raise LemixError(ErrorCode.CONFLICT, f"job {job_id} still trains this model: cancel it", param="model")
        if state.unserve():
            state.add_event("info", "its model was deleted")
            self._ending[job_id] = state
            await self._guard.once(self.save)
        self.adapters.free(job_id)

    async def find(self, job_id: str) -> types_pb2.TrainingJob | None:
        """One job; None: there is none. Raises UNAVAILABLE."""
        state = self.known(job_id) or await self._stored(job_id)
        return None if state is None else state.view()

    async def watch(
        self, job_id: str, after_sequence: int, *, existing_only: bool = False
    ) -> AsyncGenerator[tuple[types_pb2.JobEvent, types_pb2.TrainingJob]]:
        """Events with a larger sequence, each with the job after it, until the job ends, or those there are now.

        Raises NOT_FOUND, UNAVAILABLE (also when the scheduler stops).
        """
        state = await self.state_of(job_id)
        while True:
            changed = state.events.changed
            for event in state.events.after(after_sequence):
                after_sequence = event.sequence
                yield event, state.view()
            if existing_only or (state.ended and not state.events.after(after_sequence)):
                return
            if self._closing:
                raise LemixError(ErrorCode.UNAVAILABLE, "the scheduler stops", retry_after_s=_RETRY_AFTER_S)
            await changed.wait()

    async def get_file(self, file_id: str, *, param: str) -> work_pb2.FileRecord:
        """A stored file, which this field of a request names. Raises NOT_FOUND, UNAVAILABLE."""
        file = await self._guard.once(lambda: self._ledger.get_file(file_id))
        if file is None:
            raise LemixError(ErrorCode.NOT_FOUND, f"no file {file_id[:200]!r}", param=param)
        return file

    async def submit_feedback(self, example: work_pb2.TrainingExample, request_id: str, model: str) -> tuple[str, int]:
        """Add an example to the feedback job, made at the first one. Returns the job's id and the position from 1.

        Raises INVALID_REQUEST, OVERLOADED, UNAVAILABLE.
        """
        if len(example.token_ids) <= max(1, example.num_context_tokens):
            raise LemixError(ErrorCode.INVALID_REQUEST, "the example has no token to learn", param="example")
        async with self._feedback_lock:
            state = next((state for state in self._running.values() if state.endless), None)
            state = state or await self._start_feedback(model)
        if state.backlog >= self._max_feedback_backlog:
            message = f"{state.backlog} feedback examples wait to be trained"
            raise LemixError(ErrorCode.OVERLOADED, message, retry_after_s=_RETRY_AFTER_S)
        position = await self._guard.once(lambda: self._ledger.append_feedback(state.file_id, example, request_id))
        state.grow(position)
        self._changed()
        return state.job_id, position

    async def _start_feedback(self, model: str) -> JobState:
        now_unix_s = self._clock.unix_s()
        job = types_pb2.TrainingJob(
            job_id=f"feedback-{uuid.uuid4().hex[:16]}",
            model=model,
            status=types_pb2.JOB_STATUS_QUEUED,
            created_unix_s=now_unix_s,
            hyperparameters=resolve(types_pb2.Hyperparameters(learning_rate=self._feedback_learning_rate)),
        )
        record = work_pb2.JobRecord(job=job)
        file = work_pb2.FileRecord(
            file_id=JobState(record, self._clock).file_id, filename="feedback", created_unix_s=now_unix_s
        )
        await self._guard.once(lambda: self._ledger.put_file(file, []))
        return await self._start(record)

    # ------------------------------------------------------------- used by the feeder

    def running(self) -> list[JobState]:
        """Jobs that may have micro-batches to offer, oldest first."""
        return list(self._running.values())

    def num_paused(self) -> int:
        """Jobs that wait for their owner."""
        return sum(state.paused for state in self._running.values())

    def num_waiting(self) -> int:
        """Micro-batches offered that no node has."""
        return sum(len(state.microbatches.waiting) for state in self._running.values())

    async def fail(self, state: JobState, error: LemixError) -> None:
        """End a job that cannot go on."""
        if not state.ended:
            for event in self._fail_now(state, error):
                await self._inbox.put(Told(event))

    # ------------------------------------------------------------- told by the driver

    def is_wanted(self, item: work_pb2.WorkItem) -> bool:
        """Whether this micro-batch is to be trained: its job has not ended since."""
        state = self._running.get(item.training.job_id)
        return state is not None and state.is_wanted(item.task_id, item.training.sequence)

    def on_held(self, work: work_pb2.TrainingWork, *, waiting: bool) -> None:
        """The core holds this micro-batch."""
        state = self._running.get(work.job_id)
        if state is not None:
            state.held(work.sequence, waiting=waiting)
            self.fed.set()

    def on_refused(self, work: work_pb2.TrainingWork, error: LemixError) -> list[Event]:
        """The core refused this micro-batch: for now, or for good."""
        state = self._running.get(work.job_id)
        if state is None:
            return []
        state.microbatches.release(work.sequence)
        # Too many wait: it is offered again after the next change, not in a loop.
        return [] if error.code is ErrorCode.OVERLOADED else self._fail_now(state, error)

    def on_taken_back(self, item: work_pb2.WorkItem) -> None:
        """The core gave it back because its job is paused; by now it may go on."""
        state = self._running.get(item.training.job_id)
        if state is not None:
            state.microbatches.release(item.training.sequence)
            self._ask_to_save(state)
            self._changed()

    def on_outcome(self, outcome: work_pb2.WorkOutcome) -> list[Event]:
        """A micro-batch ended. May come twice."""
        training = outcome.training
        state = self._running.get(training.job_id)
        if state is None:
            return []
        if training.HasField("error") and outcome.task_id != state.task_id(training.sequence):
            return []  # it was cancelled with the job, which goes on since
        if training.skipped:
            return self._skipped(state, outcome)
        if training.HasField("error"):
            return self._fail_now(state, LemixError.from_proto(training.error))
        is_saved_now = state.microbatches.is_unsaved(training.sequence)
        if state.trained(outcome):
            metrics.TRAINED.inc()
            if state.complete:
                return self._succeed(state)
            if not is_saved_now or state.paused:  # else the rest of its checkpoint follows
                self._ask_to_save(state)
            self._changed()
        return []

    def _skipped(self, state: JobState, outcome: work_pb2.WorkOutcome) -> list[Event]:
        if not state.skipped(outcome):
            return []
        metrics.SKIPPED.inc()
        if state.skipped_too_often:
            error = LemixError.from_proto(outcome.training.error)
            most = state.hyperparameters.max_skipped_in_row
            message = f"{most} micro-batches in a row were skipped, the last because: {error.message}"
            return self._fail_now(state, LemixError(error.code, message))
        if state.complete:
            return self._succeed(state)
        self._ask_to_save(state)
        self._changed()
        return []

    def _ask_to_save(self, state: JobState) -> None:
        """Ask for checkpoints when nothing else is left to do, or nothing more may be offered before."""
        if state.only_to_save:
            for node_id in sorted(state.microbatches.unsaved_nodes):
                self._checkpoints.tell(node_id, "job_end")
        elif (blocking_id := state.microbatches.node_to_save()) is not None:
            self._checkpoints.tell(blocking_id, "interval")
        for node_id in sorted(state.nodes_to_save_paused()):
            self._checkpoints.tell(node_id, "pause")

    def on_trained(self, outcome: work_pb2.WorkOutcome) -> None:
        """A micro-batch was trained and is in no checkpoint yet. May come twice."""
        state = self._running.get(outcome.training.job_id)
        if state is None:
            return
        if state.trained_unsaved(outcome):
            self._ask_to_save(state)
            self._changed()

    def on_node_away(self, node_id: str, wait_s: float, failover: str = "") -> None:
        """A node is lost; see `driver_ports.TrainingJobs`."""
        for state in self._running.values():
            if node_id in state.microbatches.unsaved_nodes or node_id in state.view().steps_per_node:
                state.node_away(node_id, wait_s, self._checkpoints.newest_of_lost(node_id), failover)
        self._changed()

    def announce(self, job_ids: Iterable[str], level: str, message: str) -> None:
        """Tell the owners of these running jobs, or of all when none is named."""
        wanted = set(job_ids)
        for state in self._running.values():
            if not wanted or state.job_id in wanted:
                state.add_event(level, message)
        self._unsaved.set()

    def known(self, job_id: str) -> JobState | None:
        """The job if it runs, or has just ended."""
        return self._running.get(job_id) or self._ending.get(job_id)

    async def gated(self, job_id: str) -> JobState | None:
        """A job with what was measured on its held-out examples, also an ended one. Raises UNAVAILABLE."""
        known = self.known(job_id)
        if known is not None:
            return known
        record = await self._guard.once(lambda: self._ledger.get_job(job_id))
        return None if record is None else JobState(record, self._clock)

    def note(self, state: JobState, level: str, message: str) -> None:
        """Tell a job's owner something, also when the job has ended meanwhile."""
        state = self.known(state.job_id) or state
        state.add_event(level, message)
        if state.ended:
            self._ending[state.job_id] = state
        self._unsaved.set()

    async def save_checkpoint(self, job_id: str) -> list[types_pb2.Checkpoint]:
        """Save on every node that trained the job. Raises NOT_FOUND, CONFLICT, and what a node answers."""
        state = await self.state_of(job_id)
        return await self._checkpoints.save({*state.microbatches.unsaved_nodes, *state.view().steps_per_node})

    # ------------------------------------------------------------- helpers

    async def state_of(self, job_id: str) -> JobState:
        """A job with its events, from the ledger when it has ended. Raises NOT_FOUND, UNAVAILABLE."""
        known = self.known(job_id)
        if known is not None:
            return known
        stored = await self._stored(job_id)
        if stored is None:
            raise LemixError(ErrorCode.NOT_FOUND, f"no job {job_id[:200]!r}", param="job_id")
        return stored

    async def _stored(self, job_id: str) -> JobState | None:
        record = await self._guard.once(lambda: self._ledger.get_job(job_id))
        if record is None:
            return None
        state = JobState(record, self._clock)
        state.events.restore(await self._guard.once(lambda: self._ledger.read_job_events(job_id)))
        return self.known(job_id) or state  # another call may have taken it up meanwhile

    def _end(self, state: JobState, status: types_pb2.JobStatus, level: str, message: str) -> None:
        state.end(status, level, message)
        if status != types_pb2.JOB_STATUS_SUCCEEDED and state.unserve():
            self.adapters.free(state.job_id)
        self._running.pop(state.job_id, None)
        self._ending[state.job_id] = state
        _log.info("job ended", job=state.job_id, status=types_pb2.JobStatus.Name(status), reason=message)
        self._changed()

    def _succeed(self, state: JobState) -> list[Event]:
        self._end(state, types_pb2.JOB_STATUS_SUCCEEDED, "info", "the job has succeeded")
        return [JobEnded(state.job_id)]

    def _fail_now(self, state: JobState, error: LemixError) -> list[Event]:
        state.set_error(error)
        self._end(state, types_pb2.JOB_STATUS_FAILED, "error", f"the job failed: {error.message}")
        return [JobCancelled(state.job_id)]

    async def _set_sync_interval(self, state: JobState) -> None:
        if self._derive_sync_interval:
            steps = max(1, min(100, state.num_examples // 2))
            await self._inbox.put(Told(SyncIntervalSet(steps)))

    def _changed(self) -> None:
        self.fed.set()
        self._unsaved.set()
