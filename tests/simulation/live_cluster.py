"""Two scheduler cores in lockstep over real node cores, on a virtual clock; checks every command as it comes.

The checks know the rules only from the outside. The ledger's part is played too: a task that ended on a node before
its end could be told does not run again.
"""

import heapq
from collections import deque
from dataclasses import replace
from itertools import count
from random import Random

from services.latency import LatencyModel, NodeLatency, OpKind
from services.node_agent.core import types as node_core
from services.node_agent.core.types import MicrobatchArrived, NodeCoreConfig, Op, OpDone, RunOp, SyncRequested, TaskDone
from services.scheduler.core.commands import (
    ApplyWeights,
    Assign,
    CancelOnNode,
    Command,
    Defer,
    Drop,
    Reject,
    TakeSnapshot,
)
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import (
    Event,
    JobCancelled,
    NodeJoined,
    NodeLost,
    OpFinished,
    SnapshotReady,
    SyncEnded,
    TaskArrived,
    TaskCancelled,
    TaskEnded,
    TaskRecovered,
    Tick,
)
from services.scheduler.core.node_spec import NodeRole, NodeSpec
from services.scheduler.core.scheduler import SchedulerCore
from services.scheduler.core.tasks import InferenceTask, Task
from services.simulator import convert
from services.simulator.node import SimNode
from services.simulator.types import Microbatch, Request, SimulationConfig, VirtualNode
from tests.simulation.harness import latency
from tests.unit.node_core.checker import Checker

_SERVES = (NodeRole.SERVE, NodeRole.BOTH)
_TRAINS = (NodeRole.TRAIN, NodeRole.BOTH)
#: Reports that may be repeated.
_REMEMBERED = 32


class Life:
    """One life of a node: the real node core, modelled durations, a checker of what the core promises."""

    def __init__(self, virtual: VirtualNode, spec: NodeSpec, scheduler: SchedulerCore, config: CoreConfig) -> None:
        order = node_core.QueueOrder(scheduler.queue_order.value)
        self.node = SimNode(virtual, order, SimulationConfig(core=config), Random(0))
        self.spec = spec
        self.checker = Checker(self.node.core.config)

    def step(self, now_s: float, event: node_core.Event) -> list[node_core.Command]:
        self.checker.before(event)
        commands = self.node.core.step(now_s, event)
        self.checker.after(commands)
        return commands


class LiveCluster:
    """`join`, `lose`, `arrive`, `run`; raises AssertionError when a rule is broken."""

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        self.now_s = 0.0
        self.lives: dict[str, Life] = {}
        #: What the scheduler knows of each task that has not ended: where it is, "" while it waits.
        self.tasks: dict[str, Task] = {}
        self.holder: dict[str, str] = {}
        #: Every end that the scheduler told, or was told and believed.
        self.ends: dict[str, str] = {}
        #: Ends that nodes have stored, whoever has heard of them.
        self.stored: dict[str, TaskEnded] = {}
        self.delayed: deque[Event] = deque()
        self.is_delaying = False
        self.told: deque[Event] = deque(maxlen=_REMEMBERED)
        #: Reasons of the last Defer of what waits.
        self.deferred: dict[str, str] = {}
        self.starved_since_s: float | None = None
        self.num_commands = 0
        self._work: dict[str, Request | Microbatch] = {}
        self._cancelled: set[str] = set()
        self._cancels_sent: set[str] = set()
        self._backward_told: set[str] = set()
        self._sequence = count()
        self._heap: list[tuple[float, int, Life, int, Op, float]] = []
        self._queue: deque[Event] = deque()
        self.cores = (SchedulerCore(config), SchedulerCore(config))

    # ------------------------------------------------------------- what happens

    def join(self, virtual: VirtualNode) -> None:
        """A node joins, or says hello again: with as many stages it is the same process with another profile."""
        spec = convert.node_spec(virtual)
        life = self.lives.get(virtual.node_id)
        if life is not None and life.spec.num_stages == spec.num_stages:
            # The process goes on, so what it has room for stays as it is.
            spec = replace(spec, kv_capacity_tokens=life.spec.kv_capacity_tokens)
            life.spec = spec
        else:
            if life is not None:
                self._forget_node(virtual.node_id)
            self.lives[virtual.node_id] = Life(virtual, spec, self.cores[0], self.config)
        self.tell(NodeJoined(spec))

    def lose(self, node_id: str) -> None:
        """A node is gone, with everything it had not stored."""
        del self.lives[node_id]
        self._forget_node(node_id)
        self.tell(NodeLost(node_id))

    def arrive(self, work: Request | Microbatch, *, twice: bool = False) -> None:
        """Accepted work."""
        task = convert.inference_task(work) if isinstance(work, Request) else convert.training_task(work)
        self._work[work.task_id] = work
        self.tasks[work.task_id] = task
        self.holder[work.task_id] = ""
        self.tell(TaskArrived(task))
        if twice and work.task_id in self.tasks:
            self.tell(TaskArrived(task))

    def cancel(self, task_id: str) -> None:
        """Nobody wants a task any more."""
        self._cancelled.add(task_id)
        self.tell(TaskCancelled(task_id))

    def cancel_job(self, job_id: str) -> None:
        """Nobody wants the micro-batches of a job any more."""
        self._cancelled.update(
            task_id for task_id in self.tasks if getattr(self._work[task_id], "job_id", "") == job_id
        )
        self.tell(JobCancelled(job_id))

    def restart(self) -> None:
        """Another scheduler takes over with what the ledger says."""
        self.cores = (SchedulerCore(self.config), SchedulerCore(self.config))
        self.now_s += 0.01
        self.starved_since_s = None
        self._cancels_sent.clear()
        self._backward_told.clear()
        self.deferred.clear()
        # Reports meant for the predecessor; the ends among them are in the ledger.
        ended = [task_id for task_id, node_id in self.holder.items() if node_id and task_id in self.stored]
        for task_id in ended:
            self._end(task_id, "ok" if self.stored[task_id].ok else "failed")
        self.delayed.clear()
        held = {task_id: node_id for task_id, node_id in self.holder.items() if node_id}
        waiting = [task_id for task_id, node_id in self.holder.items() if not node_id]
        for node_id, life in sorted(self.lives.items()):
            self.tell(NodeJoined(life.spec))
            for task_id in [task_id for task_id, holder in held.items() if holder == node_id]:
                self.tell(TaskRecovered(self.tasks[task_id], node_id))
                if task_id in self._cancelled:
                    self.tell(TaskCancelled(task_id))
        for task_id in waiting:
            self.tell(TaskArrived(self.tasks[task_id]))
            if task_id in self._cancelled and task_id in self.tasks:
                self.tell(TaskCancelled(task_id))

    def run(self, seconds: float, *, max_steps: int = 20_000) -> None:
        """Let time pass: operations end, timers fire."""
        until_s = self.now_s + seconds
        for _ in range(max_steps):
            at_s = self._next_s()
            if at_s > until_s:
                self.now_s = until_s
                self._check_hold_back()
                return
            self.now_s = max(self.now_s, at_s)
            if self._heap and self._heap[0][0] <= self.now_s:
                self._op_ended(*heapq.heappop(self._heap)[2:])
                continue
            for life in list(self.lives.values()):
                wakeup_s = life.node.core.next_wakeup_s
                if wakeup_s is not None and wakeup_s <= self.now_s:
                    self._step_node(life, node_core.Tick())
            wakeup_s = self.cores[0].next_wakeup_s()
            if wakeup_s is not None and wakeup_s <= self.now_s:
                self.tell(Tick())
        raise AssertionError("somebody asks for ticks without end")

    def deliver(self, num: int = 10**6) -> None:
        """The first of what was delayed arrives; after the last of it nothing is delayed any more."""
        while self.delayed and num:
            num -= 1
            self.tell(self.delayed.popleft())
        self.is_delaying = bool(self.delayed)

    def tell(self, event: Event) -> None:
        """One event, and all that follows from it at once."""
        self._queue.append(event)
        if len(self._queue) > 1:
            return  # from within the loop below
        while self._queue:
            self._tell(self._queue[0])
            self._queue.popleft()

    @property
    def is_idle(self) -> bool:
        """Nothing waits, runs or is on its way."""
        return not (self.holder or self._heap or self.delayed)

    # ------------------------------------------------------------- the scheduler

    def _tell(self, event: Event) -> None:
        if isinstance(event, OpFinished | TaskEnded | SnapshotReady | SyncEnded):
            self.told.append(event)
        self._believe(event)
        commands = self.cores[0].step(self.now_s, event)
        assert self.cores[1].step(self.now_s, event) == commands, "the same inputs gave other commands"
        assert self.cores[0].next_wakeup_s() == self.cores[1].next_wakeup_s()
        for command in commands:
            self.num_commands += 1
            self._perform(command)
        if any(isinstance(c, Assign) and isinstance(self._work[c.task_id], Microbatch) for c in commands):
            self.starved_since_s = None
        self._check_starvation(event)

    def _believe(self, event: Event) -> None:
        """What a report changes in the eyes of whoever follows the rules."""
        if isinstance(event, TaskEnded) and event.node_id and self.holder.get(event.task_id) == event.node_id:
            self._end(event.task_id, "ok" if event.ok else "failed")
        elif isinstance(event, OpFinished) and event.op is OpKind.TRAIN_BACKWARD:
            if event.stage or event.part + 1 < event.parts:
                return
            held = [task_id for task_id in event.task_ids if self.holder.get(task_id) == event.node_id]
            self._backward_told.update(held)

    def _end(self, task_id: str, how: str) -> None:
        assert task_id not in self.ends
        self.ends[task_id] = how
        del self.tasks[task_id], self.holder[task_id]
        self._backward_told.discard(task_id)
        self.deferred.pop(task_id, None)

    def _forget_node(self, node_id: str) -> None:
        for task_id, holder in self.holder.items():
            if holder == node_id:
                self.holder[task_id] = ""
                self._backward_told.discard(task_id)
                self._cancels_sent.discard(task_id)
        self.starved_since_s = None

    def _perform(self, command: Command) -> None:
        match command:
            case Assign():
                self._assign(command)
            case Defer(task_id, reason):
                assert self.holder[task_id] == ""
                assert self.deferred.get(task_id) != reason, "told twice"
                self.deferred[task_id] = reason
            case Reject(task_id, code):
                assert self.holder[task_id] == ""
                self._end(task_id, code)
            case Drop(task_id):
                assert self.holder[task_id] == ""
                assert task_id in self._cancelled
                self._end(task_id, "dropped")
            case CancelOnNode(task_id, node_id):
                assert self.holder[task_id] == node_id
                assert task_id not in self._cancels_sent
                self._cancels_sent.add(task_id)
                self._step_node(self.lives[node_id], node_core.Cancelled(task_id))
            case TakeSnapshot(sync_id, node_id):
                self._step_node(self.lives[node_id], SyncRequested(f"{sync_id}/snapshot", changes_weights=False))
            case ApplyWeights(sync_id, node_id, _, sources):
                assert sources
                assert set(sources) <= set(self.lives) - {node_id}
                self._step_node(self.lives[node_id], SyncRequested(f"{sync_id}/apply", changes_weights=True))

    def _assign(self, command: Assign) -> None:
        task_id, node_id = command.task_id, command.node_id
        assert self.holder[task_id] == "", "assigned while a node holds it"
        assert task_id not in self._cancelled
        life = self.lives[node_id]
        self.holder[task_id] = node_id
        self.deferred.pop(task_id, None)
        role = next(node.role for node in self.cores[0].snapshot().nodes if node.node_id == node_id)
        work = self._work[task_id]
        held = [self.tasks[other] for other, holder in self.holder.items() if holder == node_id]
        if isinstance(work, Request):
            assert role in _SERVES
            num_held = sum(isinstance(task, InferenceTask) for task in held)
            assert num_held <= life.spec.max_inflight_inference
            needed = work.prompt_tokens + work.max_tokens
            assert needed <= min(life.spec.kv_capacity_tokens, life.spec.max_context_tokens)
        else:
            assert role in _TRAINS
            assert self._num_outstanding(node_id) <= self.config.max_inflight_training
            assert 1 <= command.parts <= life.spec.max_training_parts
        if task_id in self.stored:
            # It ended on a node that was lost before anybody heard: the ledger does not move it.
            self.tell(TaskEnded(task_id, node_id, self.stored[task_id].ok))
        elif isinstance(work, Request):
            life.node.took(task_id, work.output_tokens)
            self._step_node(life, node_core.RequestArrived(convert.node_request(work, command.queue_ttft_s)))
        else:
            microbatch = convert.node_microbatch(work, sequence=next(self._sequence), parts=command.parts)
            self._step_node(life, MicrobatchArrived(microbatch))

    def _num_outstanding(self, node_id: str) -> int:
        return sum(
            holder == node_id
            and task_id not in self._backward_told
            and not isinstance(self.tasks[task_id], InferenceTask)
            for task_id, holder in self.holder.items()
        )

    def _check_starvation(self, event: Event) -> None:
        """While training waits and every node that trains has room, only the policy can be the reason. It may wait for
        training that is under way, unless it holds nodes back by name."""
        nodes = [node for node in self.cores[0].snapshot().nodes if node.role in _TRAINS]
        waits = any(not node_id and not isinstance(self.tasks[t], InferenceTask) for t, node_id in self.holder.items())
        bound = self.config.max_inflight_training
        has_room = bool(nodes) and all(self._num_outstanding(node.node_id) < bound for node in nodes)
        is_refused = any(node.held_back_since_s is not None for node in nodes) or not any(
            node.inflight_training for node in nodes
        )
        if not (waits and has_room and is_refused):
            self.starved_since_s = None
        elif self.starved_since_s is None or isinstance(event, NodeJoined):
            self.starved_since_s = self.now_s
        self._check_hold_back()

    def _check_hold_back(self) -> None:
        if self.starved_since_s is not None:
            waited_s = self.now_s - self.starved_since_s
            assert waited_s <= self.config.max_hold_back_s + 1e-9, f"training starves for {waited_s} s"

    # ------------------------------------------------------------- the nodes

    def _next_s(self) -> float:
        times = [self._heap[0][0]] if self._heap else []
        times += [wakeup for life in self.lives.values() if (wakeup := life.node.core.next_wakeup_s) is not None]
        wakeup_s = self.cores[0].next_wakeup_s()
        return min(times if wakeup_s is None else [*times, wakeup_s], default=float("inf"))

    def _step_node(self, life: Life, event: node_core.Event) -> None:
        for command in life.step(self.now_s, event):
            if isinstance(command, RunOp):
                end_s = self.now_s + life.node.duration_s(command.stage, command.op)
                entry = (end_s, next(self._sequence), life, command.stage, command.op, self.now_s)
                heapq.heappush(self._heap, entry)
            elif isinstance(command, TaskDone):
                assert not command.detail, f"{command.task_id} can never fit: {command.detail}"
                ok = command.reason in ("stop", "length", "trained")
                output_tokens = getattr(self._work[command.task_id], "output_tokens", 0) if ok else 0
                ended = TaskEnded(command.task_id, life.node.node_id, ok, output_tokens, 1.0 if ok else None)
                self.stored[command.task_id] = ended
                self._report(ended)

    def _op_ended(self, life: Life, stage: int, op: Op, begin_s: float) -> None:
        node = life.node
        if self.lives.get(node.node_id) is not life:
            return
        is_top = stage == node.top
        first_token = op.kind is OpKind.PREFILL and is_top
        self._report(convert.trace(node.node_id, stage, op, begin_s, self.now_s, first_token=first_token))
        self._step_node(life, OpDone(stage, op.op_id, node.stopped(stage, op)))
        if op.kind is OpKind.WEIGHT_SYNC and is_top:
            sync_id, _, phase = op.subject.rpartition("/")
            is_snapshot = phase == "snapshot"
            self._report(
                SnapshotReady(sync_id, node.node_id)
                if is_snapshot
                else SyncEnded(sync_id, node.node_id, ok=True, weight_step=op.version + 1)
            )

    def _report(self, event: Event) -> None:
        if self.is_delaying:
            self.delayed.append(event)
        else:
            self.tell(event)


def virtual_node(node_id: str, num_stages: int = 1, *, slowdown: float = 1.0, **core: int | str) -> VirtualNode:
    """A small node with little room, so that every bound is met."""
    parts = int(core.pop("max_training_parts", 1))
    most = int(core.pop("max_inflight_inference", 3))
    config = NodeCoreConfig(num_stages=num_stages, **{"max_batch": 2, "kv_capacity_tokens": 400, **core})  # type: ignore[arg-type]
    sync = {OpKind.WEIGHT_SYNC: LatencyModel("constant", (0.1 * slowdown,))}
    models = latency(num_stages, slowdown=slowdown).models
    return VirtualNode(
        node_id=node_id,
        latency=NodeLatency(tuple({**stage, **sync} for stage in models)),
        core=config,
        max_inflight_inference=most,
        max_training_parts=parts,
    )
