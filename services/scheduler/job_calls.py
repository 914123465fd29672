"""What clients ask of training jobs."""

from collections.abc import AsyncGenerator

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import work_pb2
from lemix.v1 import training_service_pb2, types_pb2
from services.runtime.clock import Clock
from services.scheduler.adapters import AdapterDesk
from services.scheduler.checkpoints import CheckpointDesk
from services.scheduler.guard import LedgerGuard
from services.scheduler.hyperparameters import check_targets
from services.scheduler.job_lifecycle import JobLifecycle
from services.scheduler.job_request import new_job
from services.scheduler.jobs import JobRegistry
from services.scheduler.refusals import unavailable


class JobCalls:
    """One method for each call; pausing and feedback have modules of their own."""

    def __init__(
        self,
        *,
        jobs: JobRegistry,
        lifecycle: JobLifecycle,
        guard: LedgerGuard,
        clock: Clock,
        checkpoints: CheckpointDesk,
        adapters: AdapterDesk,
    ) -> None:
        self._jobs = jobs
        self._lifecycle = lifecycle
        self._guard = guard
        self._clock = clock
        self._checkpoints = checkpoints
        self._adapters = adapters
        self._closing = False

    def close(self) -> None:
        """End every watch because this scheduler stops."""
        self._closing = True
        for state in self._jobs.running():
            state.events.wake_watchers()

    async def create(
        self,
        request: training_service_pb2.CreateJobRequest,
        models: set[str],
        projections: frozenset[str] = frozenset(),
    ) -> types_pb2.TrainingJob:
        """Make a durable job. models, projections: what nodes serve, and what LoRA can adapt there; empty: not known.

        Raises INVALID_REQUEST, NOT_FOUND, MODEL_NOT_FOUND, OVERLOADED, UNAVAILABLE.
        """
        if models and request.model and request.model not in models:
            raise LemixError(ErrorCode.MODEL_NOT_FOUND, f"no node serves model {request.model!r}", param="model")
        file = await self._jobs.get_file(request.training_file, param="training_file")
        job = new_job(request, file, created_unix_s=self._clock.unix_s())
        check_targets(job.lora.target_modules, projections)
        if request.validation_file:
            await self._check_validation(request.validation_file)
        self._lifecycle.check_room()
        state = await self._lifecycle.start(work_pb2.JobRecord(job=job, request_id=request.request_id))
        return state.view()

    async def _check_validation(self, file_id: str) -> None:
        file = await self._guard.once(lambda: self._guard.ledger.get_file(file_id))
        if file is None or not file.num_examples:
            message = f"no file {file_id[:200]!r} with examples"
            raise LemixError(ErrorCode.NOT_FOUND, message, param="validation_file")
        if not self._checkpoints.keepers():
            message = "held-out examples are measured for checkpoints, and no connected node keeps any"
            raise LemixError(ErrorCode.INVALID_REQUEST, message, param="validation_file")

    async def get(self, job_id: str) -> types_pb2.TrainingJob:
        """One job. Raises NOT_FOUND, UNAVAILABLE."""
        return (await self._jobs.state_of(job_id)).view()

    async def cancel(self, job_id: str) -> types_pb2.TrainingJob:
        """Stop a job. Raises NOT_FOUND, CONFLICT when it has ended otherwise, UNAVAILABLE."""
        state = await self._jobs.state_of(job_id)
        if not state.ended:
            await self._lifecycle.cancel(state)
        elif state.status != types_pb2.JOB_STATUS_CANCELLED:
            raise LemixError(ErrorCode.CONFLICT, f"job {job_id} has ended already")
        return state.view()

    async def watch(
        self, job_id: str, after_sequence: int, *, existing_only: bool = False
    ) -> AsyncGenerator[tuple[types_pb2.JobEvent, types_pb2.TrainingJob]]:
        """Events with a larger sequence, each with the job after it, until the job ends, or those there are now.

        Raises NOT_FOUND, UNAVAILABLE (also when the scheduler stops).
        """
        state = await self._jobs.state_of(job_id)
        while True:
            changed = state.events.changed
            for event in state.events.after(after_sequence):
                after_sequence = event.sequence
                yield event, state.view()
            if existing_only or (state.ended and not state.events.after(after_sequence)):
                return
            if self._closing:
                raise unavailable("the scheduler stops")
            await changed.wait()

    async def delete_model(self, model: str) -> None:
        """Serve the adapter of an isolated job no longer. Raises MODEL_NOT_FOUND, CONFLICT (it trains), UNAVAILABLE."""
        job_id = model.rpartition(":")[2]
        state = self._jobs.known(job_id) or await self._jobs.stored(job_id)
        if state is None and self._adapters.free_held(job_id):
            return  # its job is not on record any more
        if state is None or not state.is_isolated:
            raise LemixError(ErrorCode.MODEL_NOT_FOUND, f"there is no model {model[:200]!r}", param="model")
        if not state.ended:
            raise LemixError(ErrorCode.CONFLICT, f"job {job_id} still trains this model: cancel it", param="model")
        if state.unserve():
            state.add_event("info", "its model was deleted")
            self._jobs.put_ending(state)
            await self._guard.once(self._jobs.save)
        self._adapters.free(job_id)

    async def save_checkpoint(self, job_id: str) -> list[types_pb2.Checkpoint]:
        """Save on every node that trained the job. Raises NOT_FOUND, CONFLICT, and what a node answers."""
        state = await self._jobs.state_of(job_id)
        return await self._checkpoints.save({*state.microbatches.unsaved_nodes, *state.view().steps_per_node})
