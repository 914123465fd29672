"""Performs the core's commands, in order. What cannot be performed goes back to the core as an event."""

import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as pb
from services.scheduler.convert import queue_by, sync_mode_to_proto
from services.scheduler.core.commands import (
    ApplyWeights,
    Assign,
    CancelOnNode,
    Command,
    DriftAlarm,
    Drop,
    Reject,
    TakeBack,
    TakeSnapshot,
    WarnBehind,
)
from services.scheduler.core.events import SyncEnded, TaskEnded
from services.scheduler.driver_state import DriverState
from services.scheduler.endings import Endings

_log = structlog.get_logger()


class Performer:
    """See the module."""

    def __init__(self, state: DriverState, endings: Endings) -> None:
        self._state = state
        self._endings = endings

    async def perform(self, command: Command) -> None:
        """Perform one command."""
        match command:
            case Assign():
                await self._assign(command)
            case Reject():
                held = self._state.tasks.pop(command.task_id)
                error = LemixError(ErrorCode[command.code], command.message, retry_after_s=command.retry_after_s)
                await self._endings.refuse(held, error)
            case Drop(task_id):
                await self._drop(task_id)
            case TakeBack(task_id):
                held = self._state.tasks[task_id]
                self._state.forget(held)
                await self._endings.take_back(held)
            case CancelOnNode(task_id, node_id):
                message = pb.NodeSessionResponse(cancel=pb.CancelWork(task_id=task_id))
                self._state.nodes.send(node_id, message)
            case TakeSnapshot(sync_id, node_id):
                snapshot = self._state.nodes.adapters.snapshot(sync_id, node_id)
                self._send_sync(sync_id, node_id, pb.NodeSessionResponse(take_snapshot=snapshot))
            case ApplyWeights():
                self._apply_weights(command)
            case WarnBehind(node_id, num_failed):
                _log.warning("node serves without what others trained", node=node_id, failed_rounds=num_failed)
            case DriftAlarm():
                _tell_drift(command)

    async def _assign(self, command: Assign) -> None:
        state, task_id, node_id = self._state, command.task_id, command.node_id
        held = state.tasks[task_id]
        overdue = state.overdue(held.item)
        if overdue is not None:
            del state.tasks[task_id]
            await self._endings.close(held, overdue)
            state.followups.append(TaskEnded(task_id, node_id, ok=False))
            return
        held.item.fencing_token = state.token
        held.item.node_keeps_checkpoints = state.nodes.keeps_checkpoints(node_id)
        if held.item.HasField("training"):
            held.item.training.parts = command.parts
        else:
            queue_by(held.item.inference, command.queue_ttft_s)
        moved = await state.guard.until_done(
            lambda: state.ledger.assign(held.item, node_id, entry_id=held.entry_id, token=state.token)
        )
        if not moved:
            state.followups.append(await self._endings.learn(task_id, node_id))
            return
        held.node_id, held.assigned_entry_id = node_id, held.entry_id
        held.entry_id = held.again = None
        if held.item.HasField("training"):
            state.jobs.on_held(held.item.training, waiting=False)
        else:
            state.gateways.assigned(task_id, node_id)

    async def _drop(self, task_id: str) -> None:
        held = self._state.tasks[task_id]
        self._state.forget(held)
        if held.again is None:  # else the attempt that was cancelled has ended on its node
            await self._endings.close(held, LemixError(ErrorCode.CANCELLED, "the request was cancelled"))

    def _apply_weights(self, command: ApplyWeights) -> None:
        nodes = self._state.nodes
        sources = {node_id: nodes.address(node_id) for node_id in command.source_node_ids}
        sources = {node_id: address for node_id, address in sources.items() if address}
        mode = sync_mode_to_proto(command.mode)
        message = pb.ApplyWeights(sync_id=command.sync_id, mode=mode, source_addresses=sources.values())
        nodes.adapters.apply(message, command.node_id, sources)
        self._send_sync(command.sync_id, command.node_id, pb.NodeSessionResponse(apply_weights=message))

    def _send_sync(self, sync_id: str, node_id: str, message: pb.NodeSessionResponse) -> None:
        if not self._state.nodes.send(node_id, message):
            self._state.followups.append(SyncEnded(sync_id, node_id, ok=False))


def _tell_drift(alarm: DriftAlarm) -> None:
    where = {"node": alarm.node_id, "stage": alarm.stage, "op": alarm.op.value, "ratio": round(alarm.ratio, 3)}
    if alarm.active:
        _log.warning("operations are off their profile", **where, advice="docs/operations.md, Drift")
    else:
        _log.info("operations are back at their profile", **where)
