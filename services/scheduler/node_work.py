"""What nodes hold when they come, go and come back: the ledger tells, and waits for those that have checkpoints."""

from collections.abc import Container
from functools import partial

import structlog

from lemix.internal.v1 import work_pb2
from services.scheduler.convert import expired_outcome, task_from_item
from services.scheduler.core.events import NodeJoined, NodeLost, TaskCancelled, TaskRecovered, TrainingHeld
from services.scheduler.core.node_spec import NodeSpec
from services.scheduler.driver_state import DriverState, Held, Step
from services.scheduler.endings import Endings
from services.scheduler.failover import Failover
from services.scheduler.inbox import NodeGone

_log = structlog.get_logger()

#: A node that is back and still being profiled, or whose checkpoint another one restores, is looked at again after this
#: long, seconds.
_LOOK_S = 1.0


class NodeWork:
    """node_return_s: how long the micro-batches of a lost node wait for it; 0: not at all."""

    def __init__(
        self, state: DriverState, endings: Endings, step: Step, failover: Failover, node_return_s: float
    ) -> None:
        self._state = state
        self._failover = failover
        self._endings = endings
        self._step = step
        self._node_return_s = node_return_s
        #: Until when the micro-batches of lost nodes wait for them, on the monotonic clock.
        self._away: dict[str, float] = {}
        #: Micro-batches that the core held on lost nodes, as they end if the ledger has forgotten how.
        self._left: dict[str, list[work_pb2.WorkOutcome]] = {}

    @property
    def wakeup_s(self) -> float | None:
        """When the next node that is away is given up, on the monotonic clock; None: none is."""
        return min(self._away.values(), default=None)

    async def arrived(self, spec: NodeSpec) -> None:
        """Bring the core in line with what the ledger says this node holds: it came back, or this scheduler did."""
        state, node_id = self._state, spec.node_id
        self._away.pop(node_id, None)
        await self._step(NodeJoined(spec))
        await self._stand_down(node_id)
        items = await state.guard.until_done(lambda: state.ledger.unfinished(node_id))
        unfinished = {item.task_id for item in items}
        for item in items:
            if item.task_id not in state.tasks:
                await self._recover(item, node_id)
            if item.HasField("inference"):
                state.gateways.assigned(item.task_id, node_id)
        await self._learn_unreported(node_id, unfinished)
        for task_id, held in list(state.tasks.items()):
            if held.node_id == node_id and task_id not in unfinished:
                await self._step(await self._endings.learn(task_id, node_id))  # it ended while nobody could tell

    async def _recover(self, item: work_pb2.WorkItem, node_id: str) -> None:
        state = self._state
        try:
            task = task_from_item(item, now_s=state.clock.monotonic_s(), now_unix_s=state.clock.unix_s())
        except ValueError as error:
            _log.error("task left to its node", task=item.task_id, node=node_id, error=str(error))
            return
        cancelled = state.refusal(item) is not None
        state.tasks[item.task_id] = Held(item, node_id=node_id)
        if item.HasField("training"):
            state.jobs.on_held(item.training, waiting=False)
        await self._step(TaskRecovered(task, node_id))
        if cancelled:
            await self._step(TaskCancelled(item.task_id))

    async def _learn_unreported(self, node_id: str, unfinished: Container[str]) -> None:
        """Micro-batches may have ended in the ledger without a report: their node was lost in between."""
        for known in [*self._left.pop(node_id, ()), *self._state.jobs.unsaved_on(node_id)]:
            if known.task_id not in unfinished:
                await self._endings.learn_unreported(known)

    async def gone(self, gone: NodeGone) -> None:
        """A node is lost: its requests are assigned again, its micro-batches too unless they wait for it."""
        state, node_id = self._state, gone.node_id
        waits = gone.may_return and self._node_return_s > 0.0
        taken = await state.guard.until_done(
            lambda: state.ledger.take_back(node_id, token=state.token, keep_training=waits)
        )
        for task_id, held in list(state.tasks.items()):
            if held.node_id != node_id:
                continue
            held.node_id = ""
            if held.item.HasField("training"):
                state.jobs.on_held(held.item.training, waiting=not waits)
                if waits:
                    del state.tasks[task_id]
                    self._left.setdefault(node_id, []).append(expired_outcome(held.item))
        if not waits:
            await self._learn_unreported(node_id, {item.task_id for item in taken})
        else:
            self._away[node_id] = state.clock.monotonic_s() + self._node_return_s
            state.jobs.on_node_away(node_id, self._node_return_s)
            busy = {held.node_id for held in state.tasks.values() if held.item.HasField("training")}
            standby_id = self._failover.reserve(node_id, busy)
            if standby_id:
                await self._step(TrainingHeld(standby_id, True))
        await self._step(NodeLost(node_id, gone.reason, keeps_training=waits))

    async def give_up_away(self) -> None:
        """Nodes that did not come back in time: the ledger delivers their micro-batches again, to others."""
        state = self._state
        for node_id, until_s in list(self._away.items()):
            if until_s > state.clock.monotonic_s():
                continue
            if node_id in state.nodes.joining or self._failover.is_under_way(node_id):
                self._away[node_id] = state.clock.monotonic_s() + _LOOK_S
            else:
                del self._away[node_id]
                _log.warning("node did not come back", node=node_id, waited_s=self._node_return_s)
                taken = await state.guard.until_done(partial(state.ledger.take_back, node_id, token=state.token))
                await self._learn_unreported(node_id, {item.task_id for item in taken})
                state.jobs.on_node_away(node_id, 0.0, self._failover.outcome(node_id))
                await self._stand_down(node_id)

    async def _stand_down(self, node_id: str) -> None:
        """Nobody need stand by for this node any more."""
        standby_id = self._failover.release(node_id)
        if standby_id:
            await self._step(TrainingHeld(standby_id, False))
