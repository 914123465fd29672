"""Drives the scheduler core over fake nodes in virtual time and keeps the log of what went in and came out."""

import heapq
import random
from dataclasses import dataclass
from itertools import count
from typing import Any

from services.latency import LatencyModel, NodeLatency, OpKind
from services.scheduler.core.codec import command_to_json, event_to_json
from services.scheduler.core.commands import ApplyWeights, Assign, CancelOnNode, Command, Drop, Reject, TakeSnapshot
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import (
    Event,
    NodeJoined,
    NodeLost,
    SnapshotReady,
    SyncEnded,
    TaskArrived,
    TaskEnded,
    Tick,
)
from services.scheduler.core.node_spec import NodeSpec
from services.scheduler.core.scheduler import SchedulerCore
from services.scheduler.core.tasks import InferenceTask, SloTarget, Task, TrainingTask
from tests.simulation.fake_node import FakeNode, Op

#: How long a fake node takes for one phase of a synchronisation, seconds.
SYNC_PHASE_S = 0.05


def latency(num_stages: int = 1, *, slowdown: float = 1.0) -> NodeLatency:
    """A plausible profile: prefill of 100 tokens 12 ms, a decode iteration 5 ms, training forward 15, backward 30."""
    models = {
        OpKind.PREFILL: LatencyModel("affine", (0.002 * slowdown, 0.0001 * slowdown)),
        OpKind.DECODE: LatencyModel("full_decode", (0.004 * slowdown, 0.0005 * slowdown, 1e-6 * slowdown)),
        OpKind.TRAIN_FORWARD: LatencyModel("affine", (0.002 * slowdown, 0.0001 * slowdown)),
        OpKind.TRAIN_BACKWARD: LatencyModel("affine", (0.004 * slowdown, 0.0002 * slowdown)),
        OpKind.OPTIMIZER_STEP: LatencyModel("constant", (0.005 * slowdown,)),
    }
    return NodeLatency((models,) * num_stages)


def spec(node_id: str, num_stages: int = 1, *, slowdown: float = 1.0, **bounds: int) -> NodeSpec:
    """A node with the profile above."""
    return NodeSpec(node_id, num_stages, latency(num_stages, slowdown=slowdown), **bounds)


def requests(num: int, rate: float, *, seed: int, start_s: float = 0.0) -> list[InferenceTask]:
    """Poisson arrivals of `rate` per second with lognormal prompts around 100 tokens."""
    rng = random.Random(seed)
    tasks = []
    at_s = start_s
    for index in range(num):
        at_s += rng.expovariate(rate)
        prompt_tokens = max(8, min(400, round(100 * rng.lognormvariate(0.0, 0.5))))
        tasks.append(InferenceTask(f"r{index}", at_s, prompt_tokens, 64, SloTarget(ttft_s=0.2, tpot_s=0.03)))
    return tasks


def output_lengths(tasks: list[InferenceTask], *, seed: int) -> dict[str, int]:
    """Output length by task id: 1 to 40 tokens."""
    rng = random.Random(seed)
    return {task.task_id: rng.randint(1, 40) for task in tasks}


def microbatches(num: int, *, job_id: str = "job", arrival_s: float = 0.0) -> list[TrainingTask]:
    """A job's micro-batches of 1 x 128 tokens."""
    return [TrainingTask(f"{job_id}-{index}", arrival_s, job_id, 1, 128) for index in range(num)]


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One step of the core."""

    now_s: float
    event: dict[str, Any]
    commands: list[dict[str, Any]]


class Simulation:
    """Virtual time over one core and its fake nodes; `at` schedules events, `run` plays them."""

    def __init__(self, config: CoreConfig, outputs: dict[str, int] | None = None, *, accumulation: int = 1) -> None:
        self.config = config
        self.core = SchedulerCore(config)
        self.outputs = outputs or {}
        self.accumulation = accumulation
        self.nodes: dict[str, FakeNode] = {}
        self.tasks: dict[str, Task] = {}
        self.log: list[LogEntry] = []
        #: What the core decided, by task id: (time, node id) of every assignment, and the one end.
        self.assignments: dict[str, list[tuple[float, str]]] = {}
        self.ends: dict[str, list[tuple[float, str]]] = {}
        self.first_tokens: dict[str, float] = {}
        self._heap: list[tuple[float, int, str, Any]] = []
        self._order = count()
        self._tick_s: float | None = None

    def at(self, now_s: float, event: Event) -> None:
        """Let an event happen."""
        self._push(now_s, "event", event)

    def offer(self, tasks: list[Any]) -> None:
        """Let tasks arrive at their arrival times."""
        for task in tasks:
            self.at(task.arrival_s, TaskArrived(task))

    def run(self, until_s: float = float("inf"), *, max_steps: int = 100_000) -> None:
        """Play events up to a time, or until nothing is left."""
        for _ in range(max_steps):
            if not self._heap or self._heap[0][0] > until_s:
                return
            now_s, _, kind, what = heapq.heappop(self._heap)
            if kind == "op":
                node, op = what
                if self.nodes.get(node.spec.node_id) is node:
                    self._op_ended(now_s, node, op)
            elif kind == "tick":
                if self._tick_s == now_s:
                    self._tick_s = None
                    self._step(now_s, Tick())
            else:
                self._step(now_s, what)
            self._pump(now_s)
        raise AssertionError(f"more than {max_steps} steps")

    # ----------------------------------------------------------------- internals

    def _push(self, at_s: float, kind: str, what: Any) -> None:
        heapq.heappush(self._heap, (at_s, next(self._order), kind, what))

    def _op_ended(self, now_s: float, node: FakeNode, op: Op) -> None:
        for event in node.end_op(now_s, op):
            self._step(now_s, event)

    def _pump(self, now_s: float) -> None:
        for node in self.nodes.values():
            for end_s, op in node.start_ops(now_s):
                self._push(end_s, "op", (node, op))
        wakeup_s = self.core.next_wakeup_s()
        if wakeup_s is not None and wakeup_s != self._tick_s:
            self._tick_s = max(wakeup_s, now_s)
            self._push(self._tick_s, "tick", None)

    def _step(self, now_s: float, event: Event) -> None:
        if isinstance(event, TaskArrived):
            self.tasks[event.task.task_id] = event.task
        elif isinstance(event, NodeJoined):
            self.nodes[event.node.node_id] = FakeNode(
                event.node, self.core.queue_order, self.outputs, self.accumulation
            )
        elif isinstance(event, NodeLost):
            self.nodes.pop(event.node_id, None)
        elif isinstance(event, TaskEnded):
            self.ends.setdefault(event.task_id, []).append((now_s, "ok" if event.ok else "failed"))
        commands = self.core.step(now_s, event)
        self.log.append(LogEntry(now_s, event_to_json(event), [command_to_json(command) for command in commands]))
        for command in commands:
            self._perform(now_s, command)

    def _perform(self, now_s: float, command: Command) -> None:
        match command:
            case Assign(task_id, node_id):
                self.assignments.setdefault(task_id, []).append((now_s, node_id))
                self.nodes[node_id].add(self.tasks[task_id])
            case CancelOnNode(task_id, node_id):
                for event in self.nodes[node_id].cancel(task_id):
                    self._push(now_s, "event", event)
            case Reject(task_id, code):
                self.ends.setdefault(task_id, []).append((now_s, code))
            case Drop(task_id):
                self.ends.setdefault(task_id, []).append((now_s, "dropped"))
            case TakeSnapshot(sync_id, node_id):
                self._push(now_s + SYNC_PHASE_S, "event", SnapshotReady(sync_id, node_id))
            case ApplyWeights(sync_id, node_id):
                step = self.nodes[node_id].steps
                self._push(now_s + SYNC_PHASE_S, "event", SyncEnded(sync_id, node_id, ok=True, weight_step=step))
