"""The quality gate: the loss on a job's held-out examples after every checkpoint, and what follows from it.

A loss worse than the best one by more than the job's tolerance is bad: such a checkpoint is not published, and after
several of a node in a row that node goes back to the best checkpoint it holds.
"""

import asyncio
from collections.abc import Iterable

import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.scheduler.checkpoints import CheckpointDesk
from services.scheduler.guard import LedgerGuard
from services.scheduler.job_state import JobState
from services.scheduler.jobs import JobRegistry

_log = structlog.get_logger()

#: Held-out examples that are used, the first ones of the file, and their tokens together.
MAX_EXAMPLES = 64
MAX_TOKENS = 65_536
#: Checkpoints looked at at once.
_MAX_TASKS = 16


class QualityGate:
    """Looks at the checkpoints of jobs that have held-out examples."""

    def __init__(self, *, jobs: JobRegistry, desk: CheckpointDesk, guard: LedgerGuard) -> None:
        self._jobs = jobs
        self._desk = desk
        self._guard = guard
        self._tasks: set[asyncio.Task[None]] = set()
        desk.on_saved = self._saved

    async def close(self) -> None:
        """Give up what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ------------------------------------------------------------- asked

    async def listed(self, job_id: str) -> list[types_pb2.Checkpoint]:
        """Checkpoints of connected nodes with what was measured of them; of one job if it is named.

        Raises UNAVAILABLE.
        """
        held = self._desk.listed(job_id)
        states = await self._states(held)
        found = []
        for listed in held:
            checkpoint = types_pb2.Checkpoint()
            checkpoint.CopyFrom(listed)
            for trained_id in checkpoint.trained_microbatches:
                state = states.get(trained_id)
                loss = None if state is None else state.heldout.loss_of(checkpoint.checkpoint_id)
                if loss is not None:
                    checkpoint.heldout_loss = loss
            found.append(checkpoint)
        return found

    async def publish(self, request: pb.PublishCheckpointRequest) -> list[types_pb2.WeightVersion]:
        """Let other nodes take over a checkpoint.

        Raises NOT_FOUND, CONFLICT when it is bad for a job it contains, also an ended one, UNAVAILABLE, and what nodes
        answer.
        """
        checkpoint_id = request.checkpoint_id
        if not request.force:
            held = self._desk.held_by(self._desk.owner_of(checkpoint_id))
            states = await self._states(stored for stored in held if stored.checkpoint_id == checkpoint_id)
            bad = sorted(job_id for job_id, state in states.items() if state.heldout.is_bad(checkpoint_id))
            if bad:
                message = f"the held-out loss of {bad[0]} is worse there than its best by more than the tolerance"
                raise LemixError(ErrorCode.CONFLICT, message, param="checkpoint_id")
        return await self._desk.publish(checkpoint_id, request.node_ids)

    async def _states(self, checkpoints: Iterable[types_pb2.Checkpoint]) -> dict[str, JobState]:
        """Jobs in these checkpoints, from the ledger when they have ended. Raises UNAVAILABLE."""
        job_ids = {job_id for checkpoint in checkpoints for job_id in checkpoint.trained_microbatches}
        states = {job_id: await self._jobs.gated(job_id) for job_id in job_ids}
        return {job_id: state for job_id, state in states.items() if state is not None}

    # ------------------------------------------------------------- measured

    def _saved(self, node_id: str, checkpoint: types_pb2.Checkpoint) -> None:
        for job_id in checkpoint.trained_microbatches:
            state = self._jobs.known(job_id)
            if state is None or state.ended:
                is_of_interest = self._brings_news(node_id, checkpoint, job_id)
            else:
                is_of_interest = bool(state.validation_file)
            if not is_of_interest:
                continue
            if len(self._tasks) >= _MAX_TASKS:
                _log.warning("held-out loss not measured: too many under way", checkpoint=checkpoint.checkpoint_id)
                return
            task = asyncio.create_task(self._look(node_id, checkpoint.checkpoint_id, job_id))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _brings_news(self, node_id: str, checkpoint: types_pb2.Checkpoint, job_id: str) -> bool:
        """Whether a checkpoint says something about a job that has ended: somebody asked for it, or it is the first of
        its node with the last that the job has trained. Not every later one, for ever."""
        others = (held for held in self._desk.held_by(node_id) if held.checkpoint_id != checkpoint.checkpoint_id)
        before = max((held.trained_microbatches.get(job_id, 0) for held in others), default=0)
        return checkpoint.reason == "request" or checkpoint.trained_microbatches[job_id] > before

    async def _look(self, node_id: str, checkpoint_id: str, job_id: str) -> None:
        try:
            state = await self._jobs.state_of(job_id)
            was_freed = state.is_isolated and not state.view().served_model
            if not state.validation_file or was_freed:
                return
            loss = await self._measure(node_id, state)
            state = await self._jobs.state_of(job_id)  # it may have ended meanwhile, or go on again
        except LemixError as error:
            _log.warning("held-out loss not measured", checkpoint=checkpoint_id, job=job_id, error=str(error))
            return
        if isinstance(loss, LemixError):
            self._jobs.note(state, "warn", f"no held-out loss of checkpoint {checkpoint_id}: {loss.message}")
            return
        verdict = state.heldout.judge(node_id, checkpoint_id, loss)
        text = f"held-out loss of checkpoint {checkpoint_id} is {loss:.4f}"
        self._jobs.note(state, "warn" if verdict == "bad" else "info", f"{text}: {verdict}")
        if verdict == "best":
            await self._best(node_id, checkpoint_id, state)
        elif verdict == "bad" and not state.ended and state.heldout.is_to_go_back(node_id):
            await self._go_back(node_id, state)

    async def _measure(self, node_id: str, state: JobState) -> float | LemixError:
        try:
            examples = await self._examples(state.validation_file)
            return await self._desk.heldout_loss(node_id, examples, state.job_id if state.is_isolated else "")
        except LemixError as error:
            return error

    async def _best(self, node_id: str, checkpoint_id: str, state: JobState) -> None:
        self._desk.keep(node_id, state.job_id, checkpoint_id)
        if not state.quality_gate.publish:
            return
        try:
            await self._desk.publish(checkpoint_id, ())
        except LemixError as error:
            self._jobs.note(state, "warn", f"checkpoint {checkpoint_id} was not published everywhere: {error.message}")

    async def _go_back(self, node_id: str, state: JobState) -> None:
        held = {checkpoint.checkpoint_id for checkpoint in self._desk.held_by(node_id)}
        target = state.heldout.best_of(held)
        if target is None:
            self._jobs.note(state, "error", f"{node_id} holds no checkpoint to go back to")
            return
        try:
            await self._desk.ask(node_id, "restore", target)
        except LemixError as error:
            self._jobs.note(state, "error", f"{node_id} could not go back to checkpoint {target}: {error.message}")
            return
        state.heldout.went_back(node_id)
        self._jobs.note(state, "warn", f"{node_id} went back to checkpoint {target} because of its held-out loss")

    async def _examples(self, file_id: str) -> list[work_pb2.TrainingExample]:
        """The first ones, as many as may be used. Raises LemixError."""
        read = await self._guard.once(lambda: self._guard.ledger.read_examples(file_id, range(MAX_EXAMPLES)))
        used: list[work_pb2.TrainingExample] = []
        num_tokens = 0
        for example in read:
            num_tokens += len(example.token_ids)
            if used and num_tokens > MAX_TOKENS:
                break
            used.append(example)
        return used
