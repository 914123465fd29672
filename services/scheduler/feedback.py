"""Feedback: one job without an end that trains every example as it comes."""

import asyncio
import uuid

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.runtime.clock import Clock
from services.scheduler.guard import LedgerGuard
from services.scheduler.hyperparameters import resolve
from services.scheduler.job_lifecycle import JobLifecycle
from services.scheduler.job_state import JobState
from services.scheduler.jobs import JobRegistry
from services.scheduler.refusals import overloaded


class Feedback:
    """At most `max_backlog` examples wait to be trained."""

    def __init__(
        self,
        *,
        jobs: JobRegistry,
        lifecycle: JobLifecycle,
        guard: LedgerGuard,
        clock: Clock,
        max_backlog: int,
        learning_rate: float,
    ) -> None:
        self._jobs = jobs
        self._lifecycle = lifecycle
        self._guard = guard
        self._clock = clock
        self._max_backlog = max_backlog
        self._learning_rate = learning_rate
        self._lock = asyncio.Lock()

    async def submit(self, example: work_pb2.TrainingExample, request_id: str, model: str) -> tuple[str, int]:
        """Add an example to the feedback job, made at the first one. Returns the job's id and the position from 1.

        Raises INVALID_REQUEST, OVERLOADED, UNAVAILABLE.
        """
        if len(example.token_ids) <= max(1, example.num_context_tokens):
            raise LemixError(ErrorCode.INVALID_REQUEST, "the example has no token to learn", param="example")
        async with self._lock:
            state = next((state for state in self._jobs.running() if state.endless), None)
            state = state or await self._start(model)
        if state.backlog >= self._max_backlog:
            raise overloaded(f"{state.backlog} feedback examples wait to be trained")
        position = await self._guard.once(
            lambda: self._guard.ledger.append_feedback(state.file_id, example, request_id)
        )
        state.grow(position)
        self._jobs.changed()
        return state.job_id, position

    async def _start(self, model: str) -> JobState:
        now_unix_s = self._clock.unix_s()
        job = types_pb2.TrainingJob(
            job_id=f"feedback-{uuid.uuid4().hex[:16]}",
            model=model,
            status=types_pb2.JOB_STATUS_QUEUED,
            created_unix_s=now_unix_s,
            hyperparameters=resolve(types_pb2.Hyperparameters(learning_rate=self._learning_rate)),
        )
        record = work_pb2.JobRecord(job=job)
        file = work_pb2.FileRecord(
            file_id=JobState(record, self._clock).file_id, filename="feedback", created_unix_s=now_unix_s
        )
        await self._guard.once(lambda: self._guard.ledger.put_file(file, []))
        return await self._lifecycle.start(record)
