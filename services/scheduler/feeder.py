"""Cuts jobs into micro-batches and keeps a bounded look-ahead of them in the core."""

import functools
import random
from dataclasses import dataclass
from typing import Final

import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import work_pb2
from services.ledger import TaskState
from services.scheduler.guard import LedgerGuard
from services.scheduler.inbox import Ended, Inbox, Offered
from services.scheduler.job_lifecycle import JobLifecycle
from services.scheduler.job_state import JobState
from services.scheduler.jobs import JobRegistry

_log = structlog.get_logger()

#: Examples read together; one micro-batch is read whatever its size.
_MAX_READ_EXAMPLES: Final = 128


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    """A micro-batch to offer: its examples are at these positions of the job's file."""

    state: JobState
    sequence: int
    positions: list[int]


class Feeder:
    """Jobs take turns, one micro-batch each."""

    def __init__(
        self, *, jobs: JobRegistry, lifecycle: JobLifecycle, guard: LedgerGuard, inbox: Inbox, look_ahead: int
    ) -> None:
        """look_ahead: most micro-batches offered that no node has."""
        self._jobs = jobs
        self._lifecycle = lifecycle
        self._guard = guard
        self._ledger = guard.ledger
        self._inbox = inbox
        self._look_ahead = look_ahead
        self._last_job_id = ""
        #: Order of the examples of one epoch, by job: the epoch being cut.
        self._orders: dict[str, tuple[int, list[int]]] = {}

    async def run(self) -> None:
        """Feed until cancelled."""
        while True:
            self._jobs.fed.clear()
            # Topped up only when half is gone, so that one read serves many micro-batches.
            if self._jobs.num_waiting() <= self._look_ahead // 2:
                while await self._feed(self._look_ahead - self._jobs.num_waiting()):
                    pass
                self._forget_ended()
            await self._jobs.fed.wait()

    async def _feed(self, room: int) -> bool:
        """Offer up to `room` micro-batches. False: there was none."""
        cuts: list[_Cut] = []
        num_examples = 0
        took = False
        while len(cuts) < room and num_examples < _MAX_READ_EXAMPLES and (offer := self._take_offer()) is not None:
            took = True
            state, sequence = offer
            if not (state.microbatches.may_have_run(sequence) and await self._is_known(state, sequence)):
                cuts.append(_Cut(state, sequence, self._positions(state, sequence)))
                num_examples += len(cuts[-1].positions)
        examples = await self._read(cuts)
        for cut in cuts:
            if cut.state.paused:
                cut.state.microbatches.release(cut.sequence)
            elif not cut.state.ended:
                await self._offer(cut, examples[cut.state.job_id])
        return took

    def _take_offer(self) -> tuple[JobState, int] | None:
        """The next micro-batch of the next job that has one."""
        for state in self._in_turn():
            sequence = state.take_offer()
            if sequence is not None:
                self._last_job_id = state.job_id
                return state, sequence
        return None

    def _in_turn(self) -> list[JobState]:
        running = sorted(self._jobs.running(), key=lambda state: state.job_id)
        after = [state for state in running if state.job_id > self._last_job_id]
        return after + [state for state in running if state.job_id <= self._last_job_id]

    async def _read(self, cuts: list[_Cut]) -> dict[str, dict[int, work_pb2.TrainingExample]]:
        """Examples by job and position. Fails the jobs whose file lacks some."""
        positions: dict[str, list[int]] = {}
        for cut in cuts:
            positions.setdefault(cut.state.job_id, []).extend(cut.positions)
        examples: dict[str, dict[int, work_pb2.TrainingExample]] = {}
        for state in {cut.state.job_id: cut.state for cut in cuts}.values():
            wanted = positions[state.job_id]
            read = await self._guard.until_done(functools.partial(self._ledger.read_examples, state.file_id, wanted))
            if len(read) < len(wanted):
                error = LemixError(ErrorCode.NOT_FOUND, f"file {state.file_id} has lost examples or has expired")
                await self._lifecycle.fail(state, error)
            else:
                examples[state.job_id] = dict(zip(wanted, read, strict=True))
        return examples

    async def _offer(self, cut: _Cut, examples: dict[int, work_pb2.TrainingExample]) -> None:
        state = cut.state
        state.held(cut.sequence, waiting=True)
        work = work_pb2.TrainingWork(
            job_id=state.job_id,
            sequence=cut.sequence,
            examples=[examples[position] for position in cut.positions],
            hyperparameters=state.hyperparameters,
            total_steps=_total_steps(state),
            last=cut.sequence == state.total_microbatches - 1,
            checkpoint=state.checkpoint,
            lora=state.lora,
            isolated=state.is_isolated,
            attempt=state.attempt,
        )
        await self._inbox.put(Offered(work_pb2.WorkItem(task_id=state.task_id(cut.sequence), training=work)))

    async def _is_known(self, state: JobState, sequence: int) -> bool:
        """After a restart: whether the ledger holds it already, as waiting, on a node or done."""
        record = await self._guard.until_done(lambda: self._ledger.record(state.task_id(sequence)))
        if record is None:
            return False
        if record.outcome is not None:
            await self._inbox.put(Ended(record.outcome))
        else:
            # Comes back through the global stream or with its node.
            state.held(sequence, waiting=record.state is TaskState.WAITING)
        return True

    def _positions(self, state: JobState, sequence: int) -> list[int]:
        """Examples of a micro-batch. Replays agree: the order of an epoch depends on job and epoch alone."""
        size = state.hyperparameters.batch_size
        if state.endless:
            return [sequence]
        per_epoch = -(-state.num_examples // size)
        epoch, index = divmod(sequence, per_epoch)
        known_epoch, order = self._orders.get(state.job_id, (-1, []))
        if known_epoch != epoch:
            order = shuffled(state.job_id, epoch, state.num_examples)
            self._orders[state.job_id] = (epoch, order)
        return order[index * size : (index + 1) * size]

    def _forget_ended(self) -> None:
        running = {state.job_id for state in self._jobs.running()}
        self._orders = {job_id: order for job_id, order in self._orders.items() if job_id in running}


def shuffled(job_id: str, epoch: int, count: int) -> list[int]:
    """Positions 0 .. count-1 in the order of this epoch."""
    order = list(range(count))
    # A string seeds through SHA-512: the same on every machine and in every process.
    random.Random(f"{job_id}/{epoch}").shuffle(order)
    return order


def _total_steps(state: JobState) -> int:
    return -(-state.total_microbatches // state.hyperparameters.gradient_accumulation_steps)
