"""Pausing jobs, and letting jobs go on that were paused, cancelled or failed."""

import asyncio

from lemix.errors import ErrorCode, LemixError
from lemix.v1 import types_pb2
from services.scheduler.adapters import model_of
from services.scheduler.job_lifecycle import JobLifecycle
from services.scheduler.job_state import JobState
from services.scheduler.jobs import JobRegistry


class JobPausing:
    """What owners ask for; at most `max_paused` jobs are paused at once."""

    def __init__(self, *, jobs: JobRegistry, lifecycle: JobLifecycle, max_paused: int) -> None:
        self._jobs = jobs
        self._lifecycle = lifecycle
        self._max_paused = max_paused
        #: One change at a time: what was checked must hold when the job changes.
        self._lock = asyncio.Lock()

    async def pause(self, job_id: str) -> types_pb2.TrainingJob:
        """Hold a job. Raises NOT_FOUND, CONFLICT when it has ended, OVERLOADED, UNAVAILABLE."""
        async with self._lock:
            await self._jobs.check_ledger()
            state = await self._jobs.state_of(job_id)
            if state.ended:
                raise LemixError(ErrorCode.CONFLICT, f"job {job_id} has ended already", param="job_id")
            if not state.paused:
                if self._jobs.num_paused() >= self._max_paused:
                    raise LemixError(ErrorCode.OVERLOADED, f"{self._max_paused} jobs are paused already")
                await self._lifecycle.pause(state)
            return state.view()

    async def resume(self, job_id: str) -> types_pb2.TrainingJob:
        """Let a job go on. Raises NOT_FOUND (also when its file has expired), CONFLICT when it has succeeded or its
        adapter was freed, OVERLOADED, UNAVAILABLE."""
        async with self._lock:
            await self._jobs.check_ledger()
            state = await self._jobs.state_of(job_id)
            if state.paused or state.ended:
                await self._check(state)
                await self._lifecycle.go_on(state)
            return state.view()

    async def _check(self, state: JobState) -> None:
        if state.status == types_pb2.JOB_STATUS_SUCCEEDED:
            raise LemixError(ErrorCode.CONFLICT, f"job {state.job_id} has succeeded", param="job_id")
        file = await self._jobs.get_file(state.file_id, param="training_file")
        if state.endless:
            state.grow(file.num_examples)
        self._lifecycle.check_room()
        job = state.view()
        if state.is_isolated and not job.served_model:
            if state.num_trained:
                message = f"the adapter of job {state.job_id} was freed when it ended: what it trained is gone"
                raise LemixError(ErrorCode.CONFLICT, f"{message}; create a new job", param="job_id")
            state.serve_again(model_of(job.model, state.job_id))
