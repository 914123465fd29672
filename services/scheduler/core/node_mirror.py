"""A node core that follows a node: it takes what the node is given, and its operations end when traces say so.

While nothing contradicts it, it is in the node's own state: running operations since when they began, batches, queues,
accumulation groups. A trace of an operation that it does not run shows that it is not. Most often a task reached the
node sooner or later than thought: then it goes back to a state before that, and takes the task in before or after that
operation began. When that explains nothing (a weight synchronisation, an operation that failed), it starts again from
what the scheduler knows.
"""

import math
from bisect import insort
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from services.latency import DECODE, MOVES, OPTIMIZER_STEP
from services.node_agent.core.node import NodeCore
from services.node_agent.core.types import (
    Cancelled,
    Command,
    Event,
    InferenceRequest,
    MicrobatchArrived,
    NodeCoreConfig,
    Op,
    OpDone,
    QueueOrder,
    RequestArrived,
    RunOp,
    Tick,
    TrainingMicrobatch,
)
from services.scheduler.core import node_spec
from services.scheduler.core.events import OpFinished
from services.scheduler.core.node_spec import NodeSpec
from services.scheduler.core.state import LiveInference, LiveTask, NodeState
from services.scheduler.core.tasks import SloTarget, TrainingTask

#: Inputs it can go back by; states among them to begin with, one before every task and every so many inputs; how often
#: it goes back for the same news.
_MOST_TAKEN = 64
_MOST_MARKS = 12
_MARK_EVERY = 8
_MOST_TRIES = 8
#: Traces that come late are remembered for so many more.
_LAG_TRACES = 256
#: Weight of a new observation of the hand-over, and the longest that counts: more is not the hand-over's.
_HANDOVER_GAIN = 0.1
_LONGEST_HANDOVER_S = 0.005
#: So many inputs are taken in although nobody asks: who asks is in a hurry. Not at once, for the ends of requests come
#: after the traces of their last operations.
_MOST_INPUTS = 8


@dataclass(slots=True, eq=False)
class _Input:
    """What happened on the node at a time: an event, or an operation that ended."""

    at_s: float
    event: Event | None = None
    trace: OpFinished | None = None
    #: When the scheduler sent the event.
    sent_s: float | None = None
    #: Requests that ended with the operation.
    stopped: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Running:
    """An operation on a stage and when the node decided to run it, seconds; it begins `NodeMirror.handover_s` later."""

    op: Op
    begin_s: float


@dataclass(slots=True)
class _Mark:
    """The state before an input was taken in; index: of that among those taken in."""

    index: int
    core: NodeCore
    running: list[Running | None]
    now_s: float


class _Lag:
    """The longest of the last `_LAG_TRACES` to twice as many times that traces took, seconds."""

    __slots__ = ("_before_s", "_count", "_newest_s")

    def __init__(self) -> None:
        self._before_s = self._newest_s = 0.0
        self._count = 0

    def observe(self, lag_s: float) -> None:
        """A trace took so long."""
        if self._count >= _LAG_TRACES:
            self._before_s, self._newest_s, self._count = self._newest_s, 0.0, 0
        self._newest_s = max(self._newest_s, lag_s)
        self._count += 1

    @property
    def longest_s(self) -> float:
        """0 before any."""
        return max(self._before_s, self._newest_s)


_at_s = attrgetter("at_s")


class NodeMirror:
    """Follows one node. Inputs are taken in when somebody asks, in the order of their times."""

    __slots__ = (
        "_config",
        "_core",
        "_delay_s",
        "_given_s",
        "_handover_s",
        "_inputs",
        "_is_lost",
        "_lag",
        "_marks",
        "_node",
        "_now_s",
        "_num_tasks",
        "_running",
        "_taken",
        "_top",
        "num_restarts",
    )

    def __init__(self, now_s: float, node: NodeState, order: node_spec.QueueOrder, default_slo: SloTarget) -> None:
        self._node = node
        self._top = node.spec.num_stages - 1
        config = core_config(node.spec)
        self._config = config.ordered(QueueOrder(order.value), default_slo.ttft_s, default_slo.tpot_s)
        self._core = NodeCore(self._config)
        self._running: list[Running | None] = [None] * node.spec.num_stages
        self._inputs: list[_Input] = []
        self._now_s = now_s
        #: Time from the end of an operation until its trace came.
        self._lag = _Lag()
        #: The newest inputs that were taken in, and where to go back to.
        self._taken: list[_Input] = []
        self._marks: list[_Mark] = []
        #: Shortest time from a decision until the node ran the task, and when tasks were given that have not run.
        self._delay_s = math.inf
        self._handover_s = 0.0
        self._given_s: dict[str, float] = {}
        self._num_tasks = 0
        #: How often it had to start again.
        self.num_restarts = 0
        #: It starts from what the scheduler knows, if that is something.
        self._is_lost = bool(node.inference or node.training)

    # ------------------------------------------------------------- what happens

    def given(self, now_s: float, live: LiveTask) -> None:
        """The node gets a task."""
        self._given_s[live.task.task_id] = now_s
        self._send(now_s, self._arrival(now_s, live))

    def cancelled(self, now_s: float, task_id: str) -> None:
        """The node is told to drop a task."""
        self._send(now_s, Cancelled(task_id))

    def ended(self, now_s: float, task_id: str, *, is_request: bool, ok: bool) -> None:
        """The node reported the end of a task; the traces of its operations came before."""
        self._given_s.pop(task_id, None)
        if not ok:
            self._is_lost = True
        if not is_request or not ok:
            return
        for item in reversed(self._inputs):
            trace = item.trace
            if trace is not None and trace.stage == self._top and task_id in trace.task_ids:
                item.stopped.append(task_id)
                return
        # Its last operation has been taken in: the mirror may think that it goes on, or even runs alone.
        self._is_lost |= any(running is not None and running.op.task_ids == (task_id,) for running in self._running)
        self._add(now_s, _Input(now_s, Cancelled(task_id)))

    def ran(self, now_s: float, trace: OpFinished) -> None:
        """An operation ended on a stage."""
        self._lag.observe(now_s - trace.end_s)
        for task_id in trace.task_ids:
            given_s = self._given_s.pop(task_id, None)
            if given_s is not None:
                self._learn_delay(max(0.0, trace.begin_s - given_s - self._handover_s))
        if trace.op not in MOVES:
            self._add(now_s, _Input(trace.end_s, trace=trace))

    def _learn_delay(self, delay_s: float) -> None:
        """A task took this time to the node: so does what was sent before and has not been taken in."""
        if delay_s >= self._delay_s:
            return
        self._delay_s = delay_s
        for item in self._inputs:
            if item.sent_s is not None:
                item.at_s = item.sent_s + delay_s
        self._inputs.sort(key=_at_s)

    def _send(self, now_s: float, event: Event) -> None:
        self._add(now_s, _Input(now_s + self.delay_s, event, sent_s=now_s))

    def _add(self, now_s: float, item: _Input) -> None:
        inputs = self._inputs
        if inputs and inputs[-1].at_s > item.at_s:
            insort(inputs, item, key=_at_s)
            return
        if len(inputs) >= _MOST_INPUTS and inputs[-1].at_s < item.at_s:
            # What is on its way has not come yet.
            self._take_in(min(now_s, item.at_s))
        inputs.append(item)

    # ------------------------------------------------------------- what it knows

    def fork(self, now_s: float) -> tuple[NodeCore, list[Running | None], list[tuple[float, Event]]]:
        """A copy of the node as last known, what runs on its stages, and what it has been given since, by time.

        What it was given counts as known when no trace of an earlier time can be on its way.
        """
        self._take_in(now_s)
        pending = [(item.at_s, item.event) for item in self._inputs if item.event is not None]
        return self._core.fork(), self._running.copy(), pending

    @property
    def lag_s(self) -> float:
        """Longest time that one of the newest traces took."""
        return self._lag.longest_s

    @property
    def delay_s(self) -> float:
        """Time that a task takes to the node: the shortest seen, 0 before any was."""
        return self._delay_s if self._delay_s < math.inf else 0.0

    @property
    def handover_s(self) -> float:
        """Mean time from the node's decision to run an operation until that begins, 0 before any was seen."""
        return self._handover_s

    @property
    def known_s(self) -> float:
        """Time of the copy that `fork` makes."""
        return self._now_s

    def _take_in(self, now_s: float) -> None:
        inputs = self._inputs
        known_s = now_s - self.lag_s
        count = len(inputs)
        while count and inputs[count - 1].trace is None and inputs[count - 1].at_s > known_s:
            count -= 1
        due = deque(inputs[:count])
        del inputs[:count]
        tries = _MOST_TRIES
        while due:
            item = due.popleft()
            if self._is_lost:
                if item.trace is not None:
                    self._now_s = max(self._now_s, item.at_s)
                continue
            self._remember(item)
            self._take(item)
            if self._is_lost and tries:
                tries -= 1
                due = self._gone_back(item, due)
        if self._is_lost:
            self._restart(now_s)

    def _remember(self, item: _Input) -> None:
        """So that it can be taken in again in another order."""
        taken, marks = self._taken, self._marks
        if len(taken) >= _MOST_TAKEN or len(marks) >= _MOST_MARKS:
            self._forget_oldest()
        if _task_id(item) or not marks or len(taken) - marks[-1].index >= _MARK_EVERY:
            marks.append(_Mark(len(taken), self._core.fork(), self._running.copy(), self._now_s))
        taken.append(item)

    def _forget_oldest(self) -> None:
        """What is older than the second mark."""
        del self._marks[:1]
        start = self._marks[0].index if self._marks else len(self._taken)
        del self._taken[:start]
        for mark in self._marks:
            mark.index -= start

    def _gone_back(self, item: _Input, due: deque[_Input]) -> deque[_Input]:
        """What is to be taken in next, from a state before a task that `item`, a trace, shows to have come sooner or
        later than thought; `due` as it is when there is none such: it stays lost."""
        trace = item.trace
        moved = None if trace is None else self._sooner(trace, due) or self._later(trace)
        if moved is None:
            return due
        arrival, at_s = moved
        first = next((i for i, taken in enumerate(self._taken) if taken is arrival or taken.at_s > at_s), -1)
        while self._marks and self._marks[-1].index > first:
            self._marks.pop()
        if not self._marks:
            return due
        mark = self._marks.pop()
        again = [*self._taken[mark.index :], *due]
        del self._taken[mark.index :]
        if arrival not in again:
            self._inputs.remove(arrival)
            again.append(arrival)
        self._core, self._running, self._now_s = mark.core, mark.running, mark.now_s
        self._is_lost = False
        arrival.at_s = at_s
        # What ended then made room for the operation that began.
        again.sort(key=lambda taken: (taken.at_s, taken.trace is None))
        return deque(again)

    def _sooner(self, trace: OpFinished, due: Iterable[_Input]) -> tuple[_Input, float] | None:
        """A task of the operation that was not there when it began, and when it came: before the stage was free, if it
        had been sent by then."""
        ends_s = (item.at_s for item in self._taken if item.trace is not None and item.trace.stage == trace.stage)
        free_s = max((end_s for end_s in ends_s if end_s <= trace.begin_s), default=-math.inf)
        for item in (*self._taken, *due, *self._inputs):
            if item.sent_s is not None and _task_id(item) in trace.task_ids:
                at_s = math.nextafter(free_s, -math.inf) if item.sent_s < free_s else trace.begin_s
                if at_s < item.at_s:
                    return item, at_s
        return None

    def _later(self, trace: OpFinished) -> tuple[_Input, float] | None:
        """The newest task that has not run, was there when the operation began and could have come after that."""
        ran: set[str] = set()
        for item in reversed(self._taken):
            if item.trace is not None:
                ran.update(item.trace.task_ids)
            elif item.at_s < trace.begin_s and _task_id(item) and _task_id(item) not in ran:
                return item, trace.begin_s
        return None

    def _take(self, item: _Input) -> None:
        at_s = self._tick(item.at_s)
        trace = item.trace
        if trace is None:
            if item.event is not None:
                self._began(at_s, self._core.step(at_s, item.event))
            return
        running = self._running[trace.stage]
        if running is None or not _is_same(running.op, trace):
            self._is_lost = True
            return
        if running.op.kind is DECODE and len(trace.task_ids) < len(running.op.task_ids):
            # The others ended before, and the report of that is on its way.
            for task_id in running.op.task_ids:
                if task_id not in trace.task_ids:
                    self._began(at_s, self._core.step(at_s, Cancelled(task_id)))
        if trace.begin_s >= running.begin_s:
            seen_s = min(trace.begin_s - running.begin_s, _LONGEST_HANDOVER_S)
            self._handover_s += _HANDOVER_GAIN * (seen_s - self._handover_s)
        self._running[trace.stage] = None
        self._began(at_s, self._core.step(at_s, OpDone(trace.stage, running.op.op_id, tuple(item.stopped))))

    def _tick(self, until_s: float) -> float:
        """Wake the core up when it wants to; returns the time it has arrived at."""
        wakeup_s = self._core.next_wakeup_s
        if wakeup_s is not None and wakeup_s < until_s:
            self._now_s = max(self._now_s, wakeup_s)
            self._began(self._now_s, self._core.step(self._now_s, Tick()))
        self._now_s = max(self._now_s, until_s)
        return self._now_s

    def _began(self, at_s: float, commands: Sequence[Command]) -> None:
        for command in commands:
            if type(command) is RunOp:
                self._running[command.stage] = Running(command.op, at_s)

    # ------------------------------------------------------------- starting again

    def _restart(self, now_s: float) -> None:
        """Start again from what the scheduler knows: who decodes, who waits for a prefill, what is to be trained.
        Prefills and micro-batches that are half done count as not begun."""
        node = self._node
        self._is_lost = False
        self.num_restarts += 1
        self._inputs.clear()
        self._taken.clear()
        self._marks.clear()
        # What runs now began when the last operation that is known of ended.
        self._now_s = at_s = min(self._now_s, now_s)
        decoding, arrived = [], []
        for live in node.inference.values():
            if live.has_first_token:
                produced = 1 + live.context_tokens - live.task.prompt_tokens
                decoding.append((node_request(live), produced))
            else:
                arrived.append(self._arrival(at_s, live))
        arrived += [self._arrival(at_s, live) for live in node.training.values() if not live.backward_done]
        self._core = NodeCore(self._config)
        self._core.restore(at_s, node.weight_step, decoding)
        self._running = [None] * node.spec.num_stages
        for event in arrived or [Tick()]:
            self._began(at_s, self._core.step(at_s, event))

    def _arrival(self, now_s: float, live: LiveTask) -> Event:
        if isinstance(live, LiveInference):
            return RequestArrived(node_request(live))
        self._num_tasks += 1
        return MicrobatchArrived(_node_microbatch(now_s, live.task, self._num_tasks, live.parts))


def _task_id(item: _Input) -> str:
    """Of an arrival."""
    match item.event:
        case RequestArrived(request):
            return request.task_id
        case MicrobatchArrived(microbatch):
            return microbatch.task_id
        case _:
            return ""


def _is_same(op: Op, trace: OpFinished) -> bool:
    """Whether a trace tells the end of this operation, or of a decode iteration with some of its requests."""
    if op.kind is not trace.op or op.part != trace.part:
        return False
    if op.kind is OPTIMIZER_STEP or op.task_ids == trace.task_ids:
        return True
    # After a new start its requests may be in another order.
    return op.kind is DECODE and set(trace.task_ids) <= set(op.task_ids)


def core_config(spec: NodeSpec) -> NodeCoreConfig:
    """How the node's core works, as far as the node told; the policy has not said in which order."""
    return NodeCoreConfig(
        num_stages=spec.num_stages,
        max_batch=spec.max_batch,
        max_prefill_tokens=spec.max_prefill_tokens,
        kv_capacity_tokens=spec.kv_capacity_tokens,
        training_schedule=spec.training_schedule,
        prefix_cache_tokens=spec.prefix_cache_tokens,
        epoch_steps=spec.epoch_steps,
        max_inflight_training=spec.max_inflight_training,
        weight_handling=spec.weight_handling,
        gradient_buffers=spec.gradient_buffers,
        max_batch_tokens=spec.max_batch_tokens,
        kv_block_tokens=spec.kv_block_tokens,
    )


def node_request(live: LiveInference) -> InferenceRequest:
    """The request as the node's core gets it."""
    task = live.task
    ttft_s = task.slo.ttft_s if live.queue_ttft_s is None else live.queue_ttft_s
    return InferenceRequest(
        task.task_id,
        task.arrival_s,
        task.prompt_tokens,
        task.max_tokens,
        None if ttft_s is None else task.arrival_s + ttft_s,
        tpot_s=task.slo.tpot_s,
        session_id=task.session_id,
        choice_of=task.choice_of,
    )


def _node_microbatch(now_s: float, task: TrainingTask, sequence: int, parts: int) -> TrainingMicrobatch:
    return TrainingMicrobatch(
        task.task_id, now_s, task.job_id, sequence, task.batch, task.length, task.accumulation, parts=parts
    )
