"""Drives the pure core: one queue of messages in, one `core.step` each, its commands performed in order.

All impurity of scheduling is here. What cannot be performed comes back to the core as an event. While the ledger is
away the driver waits for it: nothing accepted is lost, and nothing is decided on guesses.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.internal.v1 import work_pb2
from lemix.v1 import errors_pb2
from services.ledger import Delivery, TaskState
from services.runtime.clock import Clock
from services.scheduler import metrics
from services.scheduler.convert import ended_from_outcome, failed_outcome, queue_by, sync_mode_to_proto, task_from_item
from services.scheduler.core.types import (
    ApplyWeights,
    Assign,
    CancelOnNode,
    Command,
    Drop,
    Event,
    NodeJoined,
    NodeLost,
    Reject,
    SyncEnded,
    TakeSnapshot,
    TaskArrived,
    TaskCancelled,
    TaskEnded,
    TaskRecovered,
    Tick,
    WarnBehind,
)
from services.scheduler.driver_ports import Core, TrainingJobs
from services.scheduler.event_log import EventLog
from services.scheduler.explain.live import LiveTasks
from services.scheduler.explain.signatures import Change, Signature, Signatures
from services.scheduler.gateways import GatewayRegistry
from services.scheduler.guard import LedgerGuard
from services.scheduler.inbox import (
    CancelRequested,
    Delivered,
    Ended,
    Inbox,
    Message,
    NodeArrived,
    NodeGone,
    Offered,
    Told,
    Traced,
    Trained,
)
from services.scheduler.nodes import NodeRegistry

_log = structlog.get_logger()

#: While something goes wrong it is looked at this often, also when nothing happens, seconds.
_LOOK_S = 1.0
#: Cancelled requests remembered until the ledger delivers them.
_MAX_EARLY_CANCELS = 16_384


@dataclass(slots=True)
class _Held:
    """A task the core knows."""

    item: work_pb2.WorkItem
    entry_id: str | None = None
    #: Entry it was assigned from: whoever reads that again learns nothing.
    assigned_entry_id: str | None = None
    node_id: str = ""
    #: Submitted anew after its cancellation on the node, which has not been reported yet.
    again: Delivery | None = None


class Driver:
    """See the module. `run` until cancelled; raises StaleToken when another scheduler has taken over."""

    def __init__(
        self,
        *,
        core: Core,
        inbox: Inbox,
        guard: LedgerGuard,
        nodes: NodeRegistry,
        gateways: GatewayRegistry,
        jobs: TrainingJobs,
        clock: Clock,
        event_log: EventLog | None = None,
        live: LiveTasks | None = None,
        signatures: Signatures | None = None,
        node_return_s: float = 0.0,
    ) -> None:
        self._core = core
        self._inbox = inbox
        self._guard = guard
        self._ledger = guard.ledger
        self._nodes = nodes
        self._gateways = gateways
        self._jobs = jobs
        self._clock = clock
        self._token = 0
        self._event_log = event_log
        self._live = live
        self._signatures = signatures
        for signature in Signature:
            metrics.FAILURE_SIGNATURE.labels(signature.value).set(0)
        self._node_return_s = node_return_s
        #: Until when the micro-batches of lost nodes wait for them, on the monotonic clock.
        self._away: dict[str, float] = {}
        self._tasks: dict[str, _Held] = {}
        self._early_cancels: OrderedDict[str, None] = OrderedDict()
        #: Submitted anew, the attempt before is over: taken in after what is being performed.
        self._again: deque[Delivery] = deque()
        #: What performing commands made known to the core, before anything else is taken in.
        self._followups: deque[Event] = deque()

    @property
    def num_tasks(self) -> int:
        """Tasks the core knows."""
        return len(self._tasks)

    def lead(self, token: int) -> None:
        """Sign every move with this fencing token. Before `run`."""
        self._token = token

    async def run(self) -> None:
        """Take messages until cancelled."""
        while True:
            message = await self._inbox.get(self._timeout_s())
            if message is None:
                await self._step(Tick())
            else:
                await self._take(message)
            await self._give_up_away()
            await self._drain()
            await self._take_again()

    def _timeout_s(self) -> float | None:
        """How long to wait for a message; None: for ever."""
        wakeup_s = min(self._away.values(), default=None)
        core_s = self._core.next_wakeup_s()
        if wakeup_s is None or (core_s is not None and core_s < wakeup_s):
            wakeup_s = core_s
        timeout_s = None if wakeup_s is None else max(0.0, wakeup_s - self._clock.monotonic_s())
        if self._signatures is not None and self._signatures.active:
            return _LOOK_S if timeout_s is None else min(timeout_s, _LOOK_S)
        return timeout_s

    async def _take(self, message: Message) -> None:
        match message:
            case Traced(ops):
                for op in ops:
                    await self._step(op)
            case Delivered(delivery):
                await self._delivered(delivery)
            case Ended(outcome):
                await self._ended(outcome)
            case Trained(outcome):
                await self._trained(outcome)
            case Offered(item):
                await self._offered(item)
            case CancelRequested(task_id):
                await self._cancel(task_id)
            case NodeArrived(spec):
                self._away.pop(spec.node_id, None)
                await self._step(NodeJoined(spec))
                await self._recover(spec.node_id)
            case NodeGone():
                await self._node_gone(message)
            case Told(event):
                await self._step(event)

    async def _step(self, event: Event) -> None:
        self._followups.append(event)
        await self._drain()

    async def _drain(self) -> None:
        while self._followups:
            current = self._followups.popleft()
            now_s = self._clock.monotonic_s()
            started_s = time.perf_counter()
            commands = self._core.step(now_s, current)
            metrics.DECISION_SECONDS.observe(time.perf_counter() - started_s)
            metrics.events(type(current).__name__).inc()
            if self._event_log is not None:
                self._event_log.add(now_s, current, commands)
            if self._signatures is not None:
                for change in self._signatures.advance(now_s):
                    _announce(change)
            if self._live is not None:
                self._live.add(now_s, current, commands)
            for command in commands:
                metrics.commands(type(command).__name__).inc()
                await self._perform(command)

    async def _durably(self, operation: Callable[[], Awaitable[object]]) -> None:
        await self._guard.until_done(operation)

    # ------------------------------------------------------------- what comes in

    async def _delivered(self, delivery: Delivery) -> None:
        item = delivery.item
        known = self._tasks.get(item.task_id)
        if known is not None and known.assigned_entry_id == delivery.entry_id:
            return
        if known is not None:
            known.entry_id = delivery.entry_id  # delivered again, or back from a lost node
            known.again = delivery if known.node_id else None
            return
        error = self._refusal(item)
        if error is not None:
            cancelled = error.code is ErrorCode.CANCELLED
            await self._close(_Held(item, delivery.entry_id), error, cancelled=cancelled)
            return
        await self._arrive(_Held(item, delivery.entry_id))

    async def _take_again(self) -> None:
        while self._again:
            delivery = self._again.popleft()
            record = await self._guard.until_done(partial(self._ledger.record, delivery.item.task_id))
            if record is not None and record.state is TaskState.WAITING:
                await self._delivered(delivery)
            else:
                self._early_cancels.pop(delivery.item.task_id, None)

    def _refusal(self, item: work_pb2.WorkItem) -> LemixError | None:
        """Why accepted work need not run any more."""
        if item.task_id in self._early_cancels:
            del self._early_cancels[item.task_id]
            return LemixError(ErrorCode.CANCELLED, "the request was cancelled")
        if item.HasField("training") and not self._jobs.is_wanted(item.training.job_id):
            return LemixError(ErrorCode.CANCELLED, "its job has ended")
        return self._overdue(item)

    def _overdue(self, item: work_pb2.WorkItem) -> LemixError | None:
        deadline_unix_s = item.inference.deadline_unix_s
        if 0.0 < deadline_unix_s <= self._clock.unix_s():
            return LemixError(ErrorCode.DEADLINE_EXCEEDED, "its deadline passed before a node could take it")
        return None

    async def _offered(self, item: work_pb2.WorkItem) -> None:
        if item.task_id not in self._tasks and self._jobs.is_wanted(item.training.job_id):
            await self._arrive(_Held(item))

    async def _arrive(self, held: _Held) -> None:
        item = held.item
        try:
            task = task_from_item(item, now_s=self._clock.monotonic_s(), now_unix_s=self._clock.unix_s())
        except ValueError as error:
            await self._close(held, LemixError(ErrorCode.UNSUPPORTED, str(error)))
            return
        self._tasks[item.task_id] = held
        if item.HasField("training"):
            self._jobs.on_held(item.training, waiting=True)
        await self._step(TaskArrived(task))

    async def _cancel(self, task_id: str) -> None:
        held = self._tasks.get(task_id)
        if held is not None:
            if held.again is not None:
                self._cancel_early(task_id)
            await self._step(TaskCancelled(task_id))
            return
        record = await self._guard.until_done(lambda: self._ledger.record(task_id))
        if record is not None and record.state is not TaskState.DONE:
            # Accepted and not delivered yet, or on a node that has not come back: at its next sight.
            self._cancel_early(task_id)

    def _cancel_early(self, task_id: str) -> None:
        self._early_cancels[task_id] = None
        while len(self._early_cancels) > _MAX_EARLY_CANCELS:
            self._early_cancels.popitem(last=False)

    async def _ended(self, outcome: work_pb2.WorkOutcome) -> None:
        held = self._tasks.get(outcome.task_id)
        if held is not None and held.node_id == outcome.node_id:
            self._forget(held)
        if self._signatures is not None and _ran_out_of_memory(outcome):
            self._signatures.memory_failed(self._clock.monotonic_s(), outcome.node_id)
        # Held elsewhere or waiting: the ledger will say so when it is assigned again.
        self._tell_end(outcome)
        await self._step(ended_from_outcome(outcome))

    def _forget(self, held: _Held) -> None:
        """The core is done with it, but not with what was submitted anew."""
        del self._tasks[held.item.task_id]
        if held.again is not None:
            self._again.append(held.again)

    async def _trained(self, outcome: work_pb2.WorkOutcome) -> None:
        """The core is done with it. The ledger is not: when the node is lost it comes back from there."""
        held = self._tasks.get(outcome.task_id)
        if held is not None:
            if held.node_id != outcome.node_id:
                return  # it was given to another node meanwhile
            del self._tasks[outcome.task_id]
        self._jobs.on_trained(outcome)
        await self._step(ended_from_outcome(outcome))

    def _tell_end(self, outcome: work_pb2.WorkOutcome) -> None:
        if outcome.HasField("training"):
            self._followups += self._jobs.on_outcome(outcome)
        else:
            self._gateways.finished(outcome.task_id, outcome.inference)

    # ------------------------------------------------------------- nodes come and go

    async def _recover(self, node_id: str) -> None:
        """Bring the core in line with what the ledger says this node holds: it came back, or this scheduler did."""
        items = await self._guard.until_done(lambda: self._ledger.unfinished(node_id))
        unfinished = {item.task_id for item in items}
        for item in items:
            if item.task_id not in self._tasks:
                await self._recover_task(item, node_id)
            if item.HasField("inference"):
                self._gateways.assigned(item.task_id, node_id)
        for task_id, held in list(self._tasks.items()):
            if held.node_id == node_id and task_id not in unfinished:
                await self._step(await self._learn_end(task_id, node_id))  # it ended while nobody could tell

    async def _recover_task(self, item: work_pb2.WorkItem, node_id: str) -> None:
        try:
            task = task_from_item(item, now_s=self._clock.monotonic_s(), now_unix_s=self._clock.unix_s())
        except ValueError as error:
            _log.error("task left to its node", task=item.task_id, node=node_id, error=str(error))
            return
        cancelled = self._refusal(item) is not None
        self._tasks[item.task_id] = _Held(item, node_id=node_id)
        if item.HasField("training"):
            self._jobs.on_held(item.training, waiting=False)
        await self._step(TaskRecovered(task, node_id))
        if cancelled:
            await self._step(TaskCancelled(item.task_id))

    async def _node_gone(self, gone: NodeGone) -> None:
        node_id, waits = gone.node_id, gone.may_return and self._node_return_s > 0.0
        await self._durably(lambda: self._ledger.take_back(node_id, token=self._token, keep_training=waits))
        for task_id, held in list(self._tasks.items()):
            if held.node_id != node_id:
                continue
            held.node_id = ""
            if held.item.HasField("training"):
                self._jobs.on_held(held.item.training, waiting=not waits)
                if waits:
                    del self._tasks[task_id]
        if waits:
            self._away[node_id] = self._clock.monotonic_s() + self._node_return_s
            self._jobs.on_node_away(node_id, self._node_return_s)
        await self._step(NodeLost(node_id, gone.reason, keeps_training=waits))

    async def _give_up_away(self) -> None:
        """Nodes that did not come back in time: the ledger delivers their micro-batches again, to others."""
        for node_id, until_s in list(self._away.items()):
            if until_s > self._clock.monotonic_s():
                continue
            if node_id in self._nodes.joining:
                self._away[node_id] = self._clock.monotonic_s() + _LOOK_S  # it is back, and being profiled
            else:
                del self._away[node_id]
                _log.warning("node did not come back", node=node_id, waited_s=self._node_return_s)
                await self._durably(partial(self._ledger.take_back, node_id, token=self._token))
                self._jobs.on_node_away(node_id, 0.0)

    # ------------------------------------------------------------- commands

    async def _perform(self, command: Command) -> None:
        match command:
            case Assign():
                await self._assign(command)
            case Reject():
                await self._reject(command)
            case Drop(task_id):
                held = self._tasks[task_id]
                self._forget(held)
                if held.again is None:  # else the attempt that was cancelled has ended on its node
                    error = LemixError(ErrorCode.CANCELLED, "the request was cancelled")
                    await self._close(held, error, cancelled=True)
            case CancelOnNode(task_id, node_id):
                self._nodes.send(node_id, pb.NodeSessionResponse(cancel=pb.CancelWork(task_id=task_id)))
            case TakeSnapshot(sync_id, node_id):
                message = pb.NodeSessionResponse(take_snapshot=self._nodes.adapters.snapshot(sync_id, node_id))
                self._send_sync(sync_id, node_id, message)
            case ApplyWeights():
                self._apply_weights(command)
            case WarnBehind(node_id, num_failed):
                _log.warning("node serves without what others trained", node=node_id, failed_rounds=num_failed)

    async def _assign(self, command: Assign) -> None:
        task_id, node_id = command.task_id, command.node_id
        held = self._tasks[task_id]
        overdue = self._overdue(held.item)
        if overdue is not None:
            del self._tasks[task_id]
            await self._close(held, overdue)
            self._followups.append(TaskEnded(task_id, node_id, ok=False))
            return
        held.item.fencing_token = self._token
        held.item.node_keeps_checkpoints = self._nodes.keeps_checkpoints(node_id)
        if held.item.HasField("training"):
            held.item.training.parts = command.parts
        else:
            queue_by(held.item.inference, command.queue_ttft_s)
        moved = await self._guard.until_done(
            lambda: self._ledger.assign(held.item, node_id, entry_id=held.entry_id, token=self._token)
        )
        if not moved:
            self._followups.append(await self._learn_end(task_id, node_id))
            return
        held.node_id, held.assigned_entry_id = node_id, held.entry_id
        held.entry_id = held.again = None
        if held.item.HasField("training"):
            self._jobs.on_held(held.item.training, waiting=False)
        else:
            self._gateways.assigned(task_id, node_id)

    async def _learn_end(self, task_id: str, node_id: str) -> TaskEnded:
        """The core thinks that the node has this task; the ledger knows of its end. Returns what the core must hear."""
        record = await self._guard.until_done(lambda: self._ledger.record(task_id))
        held = self._tasks[task_id]
        self._forget(held)
        event = TaskEnded(task_id, node_id, ok=False)
        if record is not None and record.outcome is not None:
            self._tell_end(record.outcome)
            ended = ended_from_outcome(record.outcome)
            event = TaskEnded(task_id, node_id, ended.ok, ended.output_tokens, ended.loss)
        elif record is None or record.state is TaskState.DONE:
            error = LemixError(ErrorCode.NOT_FOUND, "the result of this request has expired")
            self._tell_end(failed_outcome(held.item, error))
        else:
            _log.warning("task held elsewhere", task=task_id, node=record.node_id, wanted=node_id)
            # Another node will report it. On none (the store lost the assignment), the ledger delivers it again.
            if record.state is TaskState.ASSIGNED:
                self._tasks[task_id] = _Held(held.item, node_id=record.node_id)
        return event

    async def _reject(self, command: Reject) -> None:
        held = self._tasks.pop(command.task_id)
        error = LemixError(ErrorCode[command.code], command.message, retry_after_s=command.retry_after_s)
        if held.item.HasField("training"):
            # Not closed: what was accepted stays accepted, the feeder offers it again or fails the job.
            self._followups += self._jobs.on_refused(held.item.training, error)
            return
        outcome = failed_outcome(held.item, error)
        forget = command.retry_after_s is not None  # the same id may come again
        await self._durably(lambda: self._ledger.close_task(outcome, entry_id=held.entry_id, forget=forget))
        self._gateways.rejected(command.task_id, error)

    async def _close(self, held: _Held, error: LemixError, *, cancelled: bool = False) -> None:
        """End a task that no node holds."""
        outcome = failed_outcome(held.item, error, cancelled=cancelled)
        await self._durably(lambda: self._ledger.close_task(outcome, entry_id=held.entry_id))
        self._tell_end(outcome)

    def _apply_weights(self, command: ApplyWeights) -> None:
        sources = {node_id: self._nodes.address(node_id) for node_id in command.source_node_ids}
        sources = {node_id: address for node_id, address in sources.items() if address}
        mode = sync_mode_to_proto(command.mode)
        message = pb.ApplyWeights(sync_id=command.sync_id, mode=mode, source_addresses=sources.values())
        self._nodes.adapters.apply(message, command.node_id, sources)
        self._send_sync(command.sync_id, command.node_id, pb.NodeSessionResponse(apply_weights=message))

    def _send_sync(self, sync_id: str, node_id: str, message: pb.NodeSessionResponse) -> None:
        if not self._nodes.send(node_id, message):
            self._followups.append(SyncEnded(sync_id, node_id, ok=False))


def _ran_out_of_memory(outcome: work_pb2.WorkOutcome) -> bool:
    ended = outcome.training if outcome.HasField("training") else outcome.inference
    return ended.HasField("error") and ended.error.code == errors_pb2.ERROR_CODE_RESOURCE_EXHAUSTED


def _announce(change: Change) -> None:
    finding = change.finding
    metrics.FAILURE_SIGNATURE.labels(finding.signature.value).set(change.active)
    numbers = {name: round(value, 3) for name, value in finding.numbers.items()}
    if change.active:
        _log.warning("failure begins", signature=finding.signature.value, advice=finding.advice, **numbers)
    else:
        _log.info("failure ended", signature=finding.signature.value, since_s=round(finding.since_s, 3), **numbers)
