"""A simulated cluster: the production scheduler core and node cores on a virtual clock.

Everything that happens is an entry of one event heap, ordered by time and then by the order of insertion, so the same
input gives the same run, byte for byte.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heappop, heappush
from random import Random
from typing import Any

from services.latency import PREFILL, WEIGHT_SYNC
from services.node_agent.core.types import (
    Cancelled,
    MicrobatchArrived,
    Op,
    OpDone,
    QueueOrder,
    RequestArrived,
    RunOp,
    SyncRequested,
    TaskDone,
)
from services.node_agent.core.types import Event as NodeEvent
from services.node_agent.core.types import Tick as NodeTick
from services.scheduler.core.commands import ApplyWeights, Assign, CancelOnNode, Command, Drop, Reject, TakeSnapshot
from services.scheduler.core.events import (
    Event,
    NodeJoined,
    NodeLost,
    OpFinished,
    SnapshotReady,
    SyncEnded,
    TaskArrived,
    TaskEnded,
    Tick,
)
from services.scheduler.core.scheduler import SchedulerCore
from services.simulator import convert
from services.simulator.dependents import Dependents
from services.simulator.journal import Journal
from services.simulator.node import SimNode
from services.simulator.training_supply import TrainingSupply
from services.simulator.types import (
    Microbatch,
    Request,
    SimulationConfig,
    SimulationResult,
    TaskRecord,
    VirtualNode,
    Work,
)

_OP_END, _NODE_EVENT, _TELL, _TELL_TRACE, _TELL_END, _ARRIVAL, _JOIN, _LOSS, _NODE_TIMER, _TIMER, _STREAM = range(11)
#: Phases of a round of synchronisation: what its operations' subjects end with.
SNAPSHOT, APPLY = "/snapshot", "/apply"

#: Time, event and commands of one step of the scheduler core.
OnStep = Callable[[float, Event, Sequence[Command]], None]


class Simulation:
    """One run: `run` once. Raises ValueError for nodes or work that make no sense.

    `training` brings micro-batches by rising arrival time, without end if it likes; one that comes later than the
    scheduler has room for waits. The run does not go on for them: it ends with the last of `work`, or, when there is
    none, at the horizon. `on_step` hears of every step of the scheduler core: what its event log would hold.
    """

    def __init__(
        self,
        config: SimulationConfig,
        nodes: Sequence[VirtualNode],
        work: Iterable[Work],
        training: Iterator[Microbatch] | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        self._config = config
        self._on_step = on_step
        self._core = SchedulerCore(config.core)
        self._order = QueueOrder(self._core.queue_order.value)
        self._random = Random(config.seed)
        self._nodes: dict[str, SimNode] = {}
        self._heap: list[tuple[float, int, int, Any, Any, Any]] = []
        self._num_events = 0
        self._now_s = 0.0
        self._journal = Journal(keep_ops=config.keep_ops)
        self._supply = TrainingSupply(
            config.core.max_waiting_training,
            iter(()) if training is None else training,
            lambda microbatch: self._journal.add(microbatch, has_to_end=False),
        )
        self._offering = False
        #: When the stream's next micro-batch is looked for; it opens with the first.
        self._stream_s = -math.inf
        self._stream_open = False
        #: Where the core thinks that tasks are.
        self._on_node: dict[str, str] = {}
        self._sequences: dict[str, int] = {}
        self._reports: deque[Event] = deque()
        #: By node, traces on their way and when they were written.
        self._traces: defaultdict[str, deque[tuple[float, OpFinished]]] = defaultdict(deque)
        self._outcome_s = config.report_s if config.outcome_s is None else config.outcome_s
        self._timer_s = math.inf
        _check_lives(nodes)
        for node in nodes:
            self._push(node.joins_s, _JOIN, node)
        items = list(work)
        self._dependents = Dependents(items)
        for item in items:
            self._journal.add(item, has_to_end=True)
            if isinstance(item, Microbatch) or not item.after:
                self._push(item.arrival_s, _ARRIVAL, item)
        self._until_horizon = training is not None and not self._journal.num_open
        if self._until_horizon and config.horizon_s == math.inf:
            raise ValueError("training alone never ends: set horizon_s")
        if self._supply.next_arrival_s < math.inf:
            # After the nodes that join at the same time: they are to share it.
            self._push(self._supply.next_arrival_s, _STREAM)

    def run(self) -> SimulationResult:
        """Go on until every task has ended, nothing more can happen, or the horizon."""
        heap = self._heap
        horizon_s = self._config.horizon_s
        journal = self._journal
        while heap and (journal.num_open or self._until_horizon):
            time_s, _, kind, a, b, c = heappop(heap)
            if time_s > horizon_s:
                self._now_s = horizon_s
                break
            self._now_s = time_s
            if kind == _OP_END:
                if a.alive:
                    self._op_ended(a, b, *c)
            else:
                self._handle(kind, a, b)
            self._tell()
        ended_s = self._now_s
        self._tell_the_rest(horizon_s)
        counters = {node_id: node.core.snapshot().memory for node_id, node in self._nodes.items()}
        return journal.result(ended_s, {name: memory for name, memory in counters.items() if memory is not None})

    def _handle(self, kind: int, a: Any, b: Any) -> None:
        """Everything rarer than the end of an operation."""
        if kind == _NODE_EVENT:
            if a.alive:
                self._step_node(a, b)
        elif kind == _TELL:
            self._reports.append(a)
        elif kind == _TELL_TRACE:
            self._told_trace(a)
        elif kind == _TELL_END:
            self._told_end(a, b)
        elif kind == _ARRIVAL:
            self._arrived(a)
        elif kind == _NODE_TIMER:
            self._node_timer(a)
        elif kind == _TIMER:
            if self._now_s >= self._timer_s:
                self._timer_s = math.inf
                self._step_core(Tick())
        elif kind == _JOIN:
            self._join(a)
        elif kind == _STREAM:
            self._stream_open = True
            self._offer_training()
        else:
            self._lose(a)

    # ------------------------------------------------------------- the clock

    def _push(self, time_s: float, kind: int, a: Any = None, b: Any = None, c: Any = None) -> None:
        self._num_events += 1
        heappush(self._heap, (time_s, self._num_events, kind, a, b, c))

    def _report(self, event: Event) -> None:
        """Tell the scheduler, after `report_s`."""
        if self._config.report_s:
            self._push(self._now_s + self._config.report_s, _TELL, event)
        else:
            self._reports.append(event)

    def _report_trace(self, trace: OpFinished) -> None:
        if self._config.report_s:
            self._traces[trace.node_id].append((self._now_s, trace))
            self._push(self._now_s + self._config.report_s, _TELL_TRACE, trace)
        else:
            self._reports.append(trace)

    def _told_trace(self, trace: OpFinished) -> None:
        traces = self._traces[trace.node_id]
        if traces and traces[0][1] is trace:  # else it came along with the end of a task
            self._reports.append(traces.popleft()[1])

    def _report_end(self, ended: TaskEnded) -> None:
        if self._outcome_s:
            self._push(self._now_s + self._outcome_s, _TELL_END, ended, self._now_s)
        else:
            self._told_end(ended, self._now_s)

    def _told_end(self, ended: TaskEnded, at_s: float) -> None:
        """The traces until then come along, and first."""
        traces = self._traces[ended.node_id]
        while traces and traces[0][0] <= at_s:
            self._reports.append(traces.popleft()[1])
        self._reports.append(ended)

    def _tell(self) -> None:
        """What was reported in this moment reaches the core, in order; its commands may cause more of it."""
        reports = self._reports
        while reports:
            self._step_core(reports.popleft())

    def _tell_the_rest(self, horizon_s: float) -> None:
        """What is still on its way to the scheduler when the last task has ended."""
        for time_s, _, kind, a, b, _ in sorted(self._heap):
            if kind in (_TELL, _TELL_TRACE, _TELL_END) and time_s <= horizon_s:
                self._now_s = time_s
                self._handle(kind, a, b)
                self._tell()

    # ------------------------------------------------------------- the scheduler

    def _step_core(self, event: Event) -> None:
        if type(event) is TaskEnded:
            self._on_node.pop(event.task_id, None)
        commands = self._core.step(self._now_s, event)
        if self._on_step is not None:
            self._on_step(self._now_s, event, commands)
        for command in commands:
            self._perform(command)
        if self._supply.has_next(self._now_s if self._stream_open else -math.inf):
            self._offer_training()
        wakeup_s = self._core.next_wakeup_s()
        if wakeup_s is not None and wakeup_s < self._timer_s:
            self._timer_s = max(wakeup_s, self._now_s)
            self._push(self._timer_s, _TIMER)

    def _perform(self, command: Command) -> None:
        match command:
            case Assign():
                self._assign(command)
            case Reject(task_id):
                self._rejected(task_id)
            case Drop(task_id):
                self._ended(task_id, "cancelled")
            case CancelOnNode(task_id, node_id):
                self._send(node_id, Cancelled(task_id))
            case TakeSnapshot(sync_id, node_id):
                self._send(node_id, SyncRequested(sync_id + SNAPSHOT, changes_weights=False))
            case ApplyWeights(sync_id, node_id):
                self._send(
                    node_id, SyncRequested(sync_id + APPLY, changes_weights=True), delay_s=self._config.transfer_s
                )

    def _rejected(self, task_id: str) -> None:
        work = self._journal.tasks[task_id].work
        if isinstance(work, Microbatch):
            self._supply.refused(work)
        else:
            self._ended(task_id, "rejected")

    def _ended(self, task_id: str, outcome: str) -> TaskRecord:
        """A task ended: those that waited for it arrive in their time, or never."""
        record = self._journal.ended(self._now_s, task_id, outcome)
        if record.ok:
            for request in self._dependents.ended(self._now_s, task_id):
                self._journal.arrives(request)
                self._push(request.arrival_s, _ARRIVAL, request)
        else:
            for request in self._dependents.failed(task_id):
                self._journal.ended(self._now_s, request.task_id, "cancelled")
        return record

    def _assign(self, command: Assign) -> None:
        record = self._journal.tasks[command.task_id]
        self._supply.left_core(command.task_id)
        self._on_node[command.task_id] = command.node_id
        if record.outcome:
            # It ended on a lost node before anybody could tell: the ledger knows and refuses to move it.
            self._reports.append(TaskEnded(command.task_id, command.node_id, record.ok))
            return
        self._journal.assigned(self._now_s, command)
        work = record.work
        node = self._nodes[command.node_id]
        if isinstance(work, Request):
            node.took(work.task_id, work.output_tokens)
            self._send(command.node_id, RequestArrived(convert.node_request(work, command.queue_ttft_s)))
        else:
            sequence = self._sequences[work.job_id] = self._sequences.get(work.job_id, -1) + 1
            microbatch = convert.node_microbatch(work, sequence=sequence, parts=command.parts)
            self._send(command.node_id, MicrobatchArrived(microbatch))

    def _send(self, node_id: str, event: NodeEvent, *, delay_s: float = 0.0) -> None:
        node = self._nodes.get(node_id)
        if node is None:
            return
        delay_s += self._config.dispatch_s
        if delay_s:
            self._push(self._now_s + delay_s, _NODE_EVENT, node, event)
        else:
            self._step_node(node, event)

    def _arrived(self, work: Work) -> None:
        if isinstance(work, Microbatch):
            self._supply.arrived(work)
            self._offer_training()
        else:
            self._step_core(TaskArrived(convert.inference_task(work)))

    def _offer_training(self) -> None:
        """The core sees no more of the backlog than it may hold, as behind the real feeder."""
        if self._offering:
            return  # the loop below goes on when the step that led here has ended
        self._offering = True
        until_s = self._now_s if self._stream_open else -math.inf
        while (work := self._supply.take(until_s)) is not None:
            self._step_core(TaskArrived(convert.training_task(work)))
        self._offering = False
        self._await_stream()

    def _await_stream(self) -> None:
        """Look again when the stream's next micro-batch arrives. One that is there already waits for room."""
        next_s = self._supply.next_arrival_s
        if self._stream_open and max(self._stream_s, self._now_s) < next_s < math.inf:
            self._stream_s = next_s
            self._push(next_s, _STREAM)

    # ------------------------------------------------------------- nodes

    def _join(self, spec: VirtualNode) -> None:
        node = SimNode(spec, self._order, self._config, self._random)
        self._nodes[spec.node_id] = node
        if spec.lost_s < math.inf:
            self._push(spec.lost_s, _LOSS, node)
        self._step_core(NodeJoined(convert.node_spec(spec)))

    def _lose(self, node: SimNode) -> None:
        node.alive = False
        del self._nodes[node.node_id]
        self._journal.node_lost(self._now_s, node.node_id)
        # Also those still on their way to it, or whose end nobody has heard of: the core will have them wait again.
        for task_id in [task_id for task_id, node_id in self._on_node.items() if node_id == node.node_id]:
            del self._on_node[task_id]
            if isinstance(self._journal.tasks[task_id].work, Microbatch):
                self._supply.waits_in_core(task_id)
        self._step_core(NodeLost(node.node_id, "simulated loss"))

    def _step_node(self, node: SimNode, event: NodeEvent) -> None:
        now_s = self._now_s
        for command in node.core.step(now_s, event):
            if type(command) is RunOp:
                stage, op = command.stage, command.op
                begin_s = now_s + self._config.handover_s
                self._push(begin_s + node.begin(stage, op), _OP_END, node, stage, (op, begin_s))
            elif type(command) is TaskDone:
                self._task_done(node, command)
        wakeup_s = node.core.next_wakeup_s
        if wakeup_s is not None and (node.timer_s is None or wakeup_s < node.timer_s):
            node.timer_s = max(wakeup_s, now_s)
            self._push(node.timer_s, _NODE_TIMER, node)

    def _node_timer(self, node: SimNode) -> None:
        time_s = self._now_s
        if node.alive and node.timer_s is not None and time_s >= node.timer_s:
            node.timer_s = None
            wakeup_s = node.core.next_wakeup_s
            if wakeup_s is not None and wakeup_s <= time_s:
                self._step_node(node, NodeTick())
            elif wakeup_s is not None:
                node.timer_s = wakeup_s
                self._push(wakeup_s, _NODE_TIMER, node)

    def _op_ended(self, node: SimNode, stage: int, op: Op, begin_s: float) -> None:
        now_s = self._now_s
        kind = op.kind
        self._journal.op_ended(node.node_id, stage, op, begin_s, now_s)
        first_token = kind is PREFILL and stage == node.top
        if first_token:
            self._journal.first_tokens(now_s, op)
        self._report_trace(convert.trace(node.node_id, stage, op, begin_s, now_s, first_token=first_token))
        node.end(stage)
        self._step_node(node, OpDone(stage, op.op_id, node.stopped(stage, op)))
        if kind is WEIGHT_SYNC and stage == node.top:
            self._sync_op_ended(node, op)

    def _sync_op_ended(self, node: SimNode, op: Op) -> None:
        if op.changes_weights:
            sync_id = op.subject.removesuffix(APPLY)
            self._report(SyncEnded(sync_id, node.node_id, ok=True, weight_step=op.version + 1))
        else:
            self._report(SnapshotReady(op.subject.removesuffix(SNAPSHOT), node.node_id))

    def _task_done(self, node: SimNode, done: TaskDone) -> None:
        task_id = done.task_id
        node.left(task_id)
        record = self._ended(task_id, done.reason)
        output_tokens = record.work.output_tokens if isinstance(record.work, Request) else 0
        self._report_end(TaskEnded(task_id, node.node_id, record.ok, output_tokens if record.ok else 0))


def _check_lives(nodes: Sequence[VirtualNode]) -> None:
    until_s: dict[str, float] = {}
    for node in sorted(nodes, key=lambda node: node.joins_s):
        if node.lost_s <= node.joins_s:
            raise ValueError(f"node {node.node_id} is lost at {node.lost_s} s, before it joins at {node.joins_s} s")
        if node.joins_s < until_s.get(node.node_id, 0.0):
            raise ValueError(f"node {node.node_id} joins at {node.joins_s} s, while it is there already")
        until_s[node.node_id] = node.lost_s
