"""Ends of tasks: reported by nodes, learnt from the ledger, or made here for work that no node holds."""

import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import work_pb2
from services.ledger import TaskState
from services.scheduler.convert import ended_from_outcome, expired_outcome, failed_outcome
from services.scheduler.core.events import TaskEnded
from services.scheduler.driver_state import DriverState, Held, Step

_log = structlog.get_logger()


class Endings:
    """Tells core, gateways and jobs of ends, and closes in the ledger what no node will."""

    def __init__(self, state: DriverState, step: Step) -> None:
        self._state = state
        self._step = step

    async def ended(self, outcome: work_pb2.WorkOutcome) -> None:
        """A node reported an end."""
        held = self._state.tasks.get(outcome.task_id)
        if held is not None and held.node_id == outcome.node_id:
            self._state.forget(held)
        # Held elsewhere or waiting: the ledger will say so when it is assigned again.
        self._tell(outcome)
        await self._step(ended_from_outcome(outcome))

    async def trained(self, outcome: work_pb2.WorkOutcome) -> None:
        """The core is done with it. The ledger is not: when the node is lost it comes back from there."""
        held = self._state.tasks.get(outcome.task_id)
        if held is not None:
            if held.node_id != outcome.node_id:
                return  # it was given to another node meanwhile
            del self._state.tasks[outcome.task_id]
        self._state.jobs.on_trained(outcome)
        await self._step(ended_from_outcome(outcome))

    async def learn(self, task_id: str, node_id: str) -> TaskEnded:
        """The core thinks that the node has this task; the ledger knows of its end. Returns what the core must hear."""
        state = self._state
        record = await state.guard.until_done(lambda: state.ledger.record(task_id))
        held = state.tasks[task_id]
        state.forget(held)
        event = TaskEnded(task_id, node_id, ok=False)
        if record is not None and record.outcome is not None:
            self._tell(record.outcome)
            ended = ended_from_outcome(record.outcome)
            event = TaskEnded(task_id, node_id, ended.ok, ended.output_tokens, ended.loss)
        elif record is None or record.state is TaskState.DONE:
            self._tell(expired_outcome(held.item))
        else:
            _log.warning("task held elsewhere", task=task_id, node=record.node_id, wanted=node_id)
            # Another node will report it. On none (the store lost the assignment), the ledger delivers it again.
            if record.state is TaskState.ASSIGNED:
                state.tasks[task_id] = Held(held.item, node_id=record.node_id)
        return event

    async def learn_unreported(self, known: work_pb2.WorkOutcome) -> None:
        """The core has let go of a micro-batch of a lost node: tell its job if it has ended, with what is `known` when
        the ledger has forgotten how."""
        record = await self._state.guard.until_done(lambda: self._state.ledger.record(known.task_id))
        if record is None or record.state is TaskState.DONE:
            self._tell(known if record is None or record.outcome is None else record.outcome)

    async def close(self, held: Held, error: LemixError) -> None:
        """End a task that no node holds."""
        outcome = failed_outcome(held.item, error)
        await self._close(held, outcome)
        self._tell(outcome)

    async def refuse(self, held: Held, error: LemixError) -> None:
        """End a task that the core refused. A micro-batch is not closed: what was accepted stays accepted, the feeder
        offers it again or fails the job."""
        if held.item.HasField("training"):
            self._state.followups += self._state.jobs.on_refused(held.item.training, error)
            return
        # The same id may come again when the refusal passes.
        await self._close(held, failed_outcome(held.item, error), forget=error.retry_after_s is not None)
        self._state.gateways.rejected(held.item.task_id, error)

    async def take_back(self, held: Held) -> None:
        """Leave nothing of a micro-batch in the ledger: it is offered again when its job goes on."""
        outcome = failed_outcome(held.item, LemixError(ErrorCode.CANCELLED, "its job is paused"))
        await self._close(held, outcome, forget=True)
        self._state.jobs.on_taken_back(held.item)

    async def _close(self, held: Held, outcome: work_pb2.WorkOutcome, *, forget: bool = False) -> None:
        ledger = self._state.ledger
        await self._state.guard.until_done(lambda: ledger.close_task(outcome, entry_id=held.entry_id, forget=forget))

    def _tell(self, outcome: work_pb2.WorkOutcome) -> None:
        if outcome.HasField("training"):
            self._state.followups += self._state.jobs.on_outcome(outcome)
        else:
            self._state.gateways.finished(outcome.task_id, outcome.inference)
