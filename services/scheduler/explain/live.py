"""The tasks that a core holds, followed step by step for those who watch them.

Pure like the core: fed with every step's (time, event, commands), from a live scheduler or from its event log. Memory
is bounded by the work that is live in the core.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from services.scheduler.core.commands import Assign, CancelOnNode, Command, Defer, Drop, Reject, TakeBack
from services.scheduler.core.events import (
    Event,
    NodeJoined,
    NodeLost,
    OpFinished,
    TaskArrived,
    TaskEnded,
    TaskRecovered,
)
from services.scheduler.core.node_spec import NodeSpec
from services.scheduler.core.tasks import InferenceTask, Task, TrainingTask
from services.scheduler.explain.types import Decision, Promise


@dataclass(slots=True, eq=False)
class Live:
    """A task the core holds; it waits while `node_id` is empty.

    `decision`, `waits` and `reason` are for `Decisions` to note, `promise` for `Signatures`.
    """

    task: Task
    node_id: str = ""
    cancelled: bool = False
    decision: Decision | None = None
    waits: dict[str, float] = field(default_factory=dict)
    #: Reason to wait it was given last.
    reason: str = ""
    #: Open promise; None: there is none, or it no longer counts.
    promise: Promise | None = None


@dataclass(slots=True, eq=False)
class LiveNode:
    """A node that is there."""

    top_stage: int
    kv_capacity_tokens: int
    kv_promised_tokens: int = 0

    @property
    def kv_share(self) -> float:
        """KV cache promised to the requests it holds over its capacity; above 1: some wait there for room."""
        return self.kv_promised_tokens / self.kv_capacity_tokens


class Watcher(Protocol):
    """Hears what became of tasks, in order."""

    def arrived(self, live: Live) -> None:
        """The core took it in, or took it over from a scheduler before."""

    def placed(self, now_s: float, live: Live, command: Assign | None) -> None:
        """It goes to `live.node_id`, whose promised KV cache is still without it. None: it was there already."""

    def deferred(self, now_s: float, live: Live, reason: str) -> None:
        """It waits."""

    def op_finished(self, op: OpFinished, lives: Sequence[Live]) -> None:
        """A trace; `lives`: those of its tasks that are on the node."""

    def left(self, now_s: float, live: Live, ended: TaskEnded | None) -> None:
        """It left its node: by its end, or with the node (None); then it waits again, in the core or for its node."""

    def refused(self, now_s: float, live: Live, command: Reject) -> None:
        """It will not run."""

    def cancelled(self, live: Live) -> None:
        """Nobody wants it any more."""


class LiveTasks:
    """Feeds watchers. What the core ignores, as reports of a node that no longer has the task, they do not hear."""

    def __init__(self) -> None:
        self._watchers: list[Watcher] = []
        self._lives: dict[str, Live] = {}
        self._nodes: dict[str, LiveNode] = {}

    def __len__(self) -> int:
        return len(self._lives)

    def __iter__(self) -> Iterator[Live]:
        return iter(self._lives.values())

    def watch(self, watcher: Watcher) -> None:
        """Tell it of every step from now on."""
        self._watchers.append(watcher)

    def get(self, task_id: str) -> Live | None:
        """A task that waits or is on a node."""
        return self._lives.get(task_id)

    def node(self, node_id: str) -> LiveNode | None:
        """A node that is there."""
        return self._nodes.get(node_id)

    def add(self, now_s: float, event: Event, commands: Iterable[Command]) -> None:
        """Take in one step of the core. Steps must come in order."""
        if type(event) is OpFinished:
            self._op_finished(event)
        else:
            self._happened(now_s, event)
        for command in commands:
            self._commanded(now_s, command)

    # ------------------------------------------------------------- what happened

    def _happened(self, now_s: float, event: Event) -> None:
        match event:
            case TaskArrived(task):
                self._arrived(task)
            case TaskEnded(task_id, node_id):
                live = self._lives.get(task_id)
                if live is not None and live.node_id == node_id:
                    self._leave(now_s, live, event)
                    del self._lives[task_id]
            case TaskRecovered(task, node_id):
                new = self._arrived(task)
                if new is not None and node_id in self._nodes:
                    self._place(now_s, new, node_id, None)
            case NodeJoined(spec):
                self._node_joined(now_s, spec)
            case NodeLost(node_id):
                self._node_lost(now_s, node_id, keeps_training=event.keeps_training)
            case _:
                pass

    def _arrived(self, task: Task) -> Live | None:
        if task.task_id in self._lives:
            return None
        self._lives[task.task_id] = live = Live(task)
        for watcher in self._watchers:
            watcher.arrived(live)
        return live

    def _op_finished(self, op: OpFinished) -> None:
        lives, node_id = self._lives, op.node_id
        here = [live for task_id in op.task_ids if (live := lives.get(task_id)) and live.node_id == node_id]
        for watcher in self._watchers:
            watcher.op_finished(op, here)

    def _node_joined(self, now_s: float, spec: NodeSpec) -> None:
        known = self._nodes.get(spec.node_id)
        if known is not None and known.top_stage == spec.num_stages - 1:
            known.kv_capacity_tokens = max(1, spec.kv_capacity_tokens)
            return
        self._node_lost(now_s, spec.node_id)
        self._nodes[spec.node_id] = LiveNode(spec.num_stages - 1, max(1, spec.kv_capacity_tokens))

    def _node_lost(self, now_s: float, node_id: str, *, keeps_training: bool = False) -> None:
        if node_id not in self._nodes:
            return
        for live in [live for live in self._lives.values() if live.node_id == node_id]:
            self._leave(now_s, live, None)
            if keeps_training and isinstance(live.task, TrainingTask):
                del self._lives[live.task.task_id]  # it waits outside of the core and comes back with the node
        del self._nodes[node_id]

    def _leave(self, now_s: float, live: Live, ended: TaskEnded | None) -> None:
        node = self._nodes.get(live.node_id)
        if node is not None:
            node.kv_promised_tokens -= _kv_tokens(live.task)
        for watcher in self._watchers:
            watcher.left(now_s, live, ended)
        live.node_id = ""

    # ------------------------------------------------------------- what was decided

    def _commanded(self, now_s: float, command: Command) -> None:
        match command:
            case Assign(task_id):
                live = self._lives.get(task_id)
                if live is not None:
                    self._place(now_s, live, command.node_id, command)
            case Defer(task_id, reason):
                live = self._lives.get(task_id)
                if live is not None:
                    for watcher in self._watchers:
                        watcher.deferred(now_s, live, reason)
            case Reject(task_id):
                live = self._lives.pop(task_id, None)
                if live is not None:
                    for watcher in self._watchers:
                        watcher.refused(now_s, live, command)
            case CancelOnNode(task_id):
                self._cancelled(self._lives.get(task_id))
            case Drop(task_id):
                self._cancelled(self._lives.pop(task_id, None))
            case TakeBack(task_id):
                self._cancelled(self._lives.pop(task_id, None))
            case _:
                pass

    def _place(self, now_s: float, live: Live, node_id: str, command: Assign | None) -> None:
        live.node_id = node_id
        for watcher in self._watchers:
            watcher.placed(now_s, live, command)
        node = self._nodes.get(node_id)
        if node is not None:
            node.kv_promised_tokens += _kv_tokens(live.task)

    def _cancelled(self, live: Live | None) -> None:
        if live is not None:
            live.cancelled = True
            for watcher in self._watchers:
                watcher.cancelled(live)


def _kv_tokens(task: Task) -> int:
    return task.prompt_tokens + task.max_tokens if isinstance(task, InferenceTask) else 0
