"""Work that comes in: delivered by the ledger, offered by the feeder, cancelled by whoever submitted it."""

from functools import partial

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import work_pb2
from services.ledger import Delivery, TaskState
from services.scheduler.convert import task_from_item
from services.scheduler.core.events import TaskArrived, TaskCancelled
from services.scheduler.driver_state import DriverState, Held, Step
from services.scheduler.endings import Endings


class Arrivals:
    """Takes each task into the core once, however often it is delivered."""

    def __init__(self, state: DriverState, endings: Endings, step: Step) -> None:
        self._state = state
        self._endings = endings
        self._step = step

    async def delivered(self, delivery: Delivery) -> None:
        """The ledger delivered a task."""
        item = delivery.item
        known = self._state.tasks.get(item.task_id)
        if known is not None and known.assigned_entry_id == delivery.entry_id:
            return
        if known is not None:
            known.entry_id = delivery.entry_id  # delivered again, or back from a lost node
            known.again = delivery if known.node_id else None
            return
        held = Held(item, delivery.entry_id)
        error = self._state.refusal(item)
        if error is not None:
            await self._endings.close(held, error)
            return
        await self._arrive(held)

    async def take_again(self) -> None:
        """Take in what was submitted anew and whose attempt before is over."""
        state = self._state
        while state.again:
            delivery = state.again.popleft()
            record = await state.guard.until_done(partial(state.ledger.record, delivery.item.task_id))
            if record is not None and record.state is TaskState.WAITING:
                await self.delivered(delivery)
            else:
                state.take_early_cancel(delivery.item.task_id)

    async def offered(self, item: work_pb2.WorkItem) -> None:
        """A job offers a micro-batch."""
        if item.task_id not in self._state.tasks and self._state.jobs.is_wanted(item):
            await self._arrive(Held(item))

    async def cancel(self, task_id: str) -> None:
        """Nobody wants this task any more."""
        state = self._state
        held = state.tasks.get(task_id)
        if held is not None:
            if held.again is not None:
                state.cancel_early(task_id)
            await self._step(TaskCancelled(task_id))
            return
        record = await state.guard.until_done(lambda: state.ledger.record(task_id))
        if record is not None and record.state is not TaskState.DONE:
            # Accepted and not delivered yet, or on a node that has not come back: at its next sight.
            state.cancel_early(task_id)

    async def _arrive(self, held: Held) -> None:
        state, item = self._state, held.item
        try:
            task = task_from_item(item, now_s=state.clock.monotonic_s(), now_unix_s=state.clock.unix_s())
        except ValueError as error:
            await self._endings.close(held, LemixError(ErrorCode.UNSUPPORTED, str(error)))
            return
        state.tasks[item.task_id] = held
        if item.HasField("training"):
            state.jobs.on_held(item.training, waiting=True)
        await self._step(TaskArrived(task))
