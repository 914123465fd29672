"""The newest decisions of a core: the terms behind each, joined later with what really happened.

Pure like the core: fed with every step's (time, event, commands), from a live scheduler or from its event log.
Memory is bounded by the newest decisions kept plus the work that is live in the core.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from services.latency import OpKind
from services.scheduler.core.types import (
    Assign,
    CancelOnNode,
    Command,
    Defer,
    Drop,
    Event,
    InferenceTask,
    NodeJoined,
    NodeLost,
    NodeSpec,
    OpFinished,
    Reject,
    Task,
    TaskArrived,
    TaskEnded,
    TaskRecovered,
)
from services.scheduler.explain.types import Decision, Fate, Outcome

DEFAULT_CAPACITY: Final = 4096

_FORWARDS: Final = (OpKind.PREFILL, OpKind.DECODE, OpKind.TRAIN_FORWARD)


@dataclass(slots=True, eq=False)
class _Live:
    """A task the core holds; it waits while `node_id` is empty."""

    task: Task
    node_id: str = ""
    decision: Decision | None = None
    waits: dict[str, float] = field(default_factory=dict)
    #: Reason it was given last.
    reason: str = ""
    cancelled: bool = False


@dataclass(slots=True, eq=False)
class _Node:
    top_stage: int
    kv_capacity_tokens: int
    kv_promised_tokens: int = 0


class Decisions:
    """The newest `capacity` decisions of one core. Raises ValueError when that is not at least 1."""

    def __init__(self, policy: str, capacity: int = DEFAULT_CAPACITY) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self._policy = policy
        self._capacity = capacity
        self._num_made = 0
        self._kept: deque[Decision] = deque(maxlen=capacity)
        self._live: dict[str, _Live] = {}
        self._nodes: dict[str, _Node] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def capacity(self) -> int:
        """Most decisions kept."""
        return self._capacity

    @property
    def num_live(self) -> int:
        """Tasks that wait or are on a node."""
        return len(self._live)

    def newest(self, limit: int) -> list[Decision]:
        """The newest decisions first, at most `limit`."""
        return list(islice(reversed(self._kept), limit))

    def of_task(self, task_id: str) -> list[Decision]:
        """What is kept about a task, oldest first: more than one decision when it lost its node."""
        return [decision for decision in self._kept if decision.task.task_id == task_id]

    def is_live(self, task_id: str) -> bool:
        """Whether a task waits or is on a node."""
        return task_id in self._live

    def waits(self, task_id: str) -> Mapping[str, float]:
        """Why a task waits now: reason -> since when, seconds. Empty: it does not wait."""
        live = self._live.get(task_id)
        return {} if live is None or live.node_id or not live.waits else {live.reason: live.waits[live.reason]}

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
                self._live.setdefault(task.task_id, _Live(task))
            case TaskEnded():
                self._task_ended(now_s, event)
            case TaskRecovered(task, node_id):
                if task.task_id not in self._live:
                    self._live[task.task_id] = live = _Live(task)
                    if node_id in self._nodes:
                        self._put(live, node_id)
            case NodeJoined(spec):
                self._node_joined(now_s, spec)
            case NodeLost(node_id):
                self._node_lost(now_s, node_id)
            case _:
                pass

    def _op_finished(self, op: OpFinished) -> None:
        node_id = op.node_id
        node = self._nodes.get(node_id)
        if node is None:
            return
        is_forward_end = op.stage == node.top_stage and op.part + 1 == op.parts and op.op in _FORWARDS
        for task_id in op.task_ids:
            live = self._live.get(task_id)
            if live is None or live.decision is None or live.node_id != node_id:
                continue
            outcome = live.decision.outcome
            if outcome.first_op_s is None or op.begin_s < outcome.first_op_s:
                outcome.first_op_s = op.begin_s
            if is_forward_end:
                outcome.forward_end_s = op.end_s
                if op.first_token and outcome.first_token_s is None:
                    outcome.first_token_s = op.end_s

    def _task_ended(self, now_s: float, event: TaskEnded) -> None:
        live = self._live.get(event.task_id)
        if live is None or live.node_id != event.node_id:
            return  # a late report, which the core ignores as well
        fate = Fate.OK if event.ok else Fate.CANCELLED if live.cancelled else Fate.FAILED
        self._leave(now_s, live, fate, event.output_tokens)
        del self._live[event.task_id]

    def _node_joined(self, now_s: float, spec: NodeSpec) -> None:
        known = self._nodes.get(spec.node_id)
        if known is not None and known.top_stage == spec.num_stages - 1:
            known.kv_capacity_tokens = max(1, spec.kv_capacity_tokens)
            return
        self._node_lost(now_s, spec.node_id)
        self._nodes[spec.node_id] = _Node(spec.num_stages - 1, max(1, spec.kv_capacity_tokens))

    def _node_lost(self, now_s: float, node_id: str) -> None:
        if node_id not in self._nodes:
            return
        for live in self._live.values():
            if live.node_id == node_id:
                self._leave(now_s, live, Fate.NODE_LOST, 0)
        del self._nodes[node_id]

    def _leave(self, now_s: float, live: _Live, fate: Fate, output_tokens: int) -> None:
        node = self._nodes.get(live.node_id)
        if node is not None:
            node.kv_promised_tokens -= _kv_tokens(live.task)
        if live.decision is not None:
            outcome = live.decision.outcome
            outcome.fate, outcome.ended_s, outcome.output_tokens = fate, now_s, output_tokens
        live.node_id, live.decision = "", None

    # ------------------------------------------------------------- what was decided

    def _commanded(self, now_s: float, command: Command) -> None:
        match command:
            case Assign(task_id):
                live = self._live.get(task_id)
                if live is not None:
                    self._assigned(now_s, live, command)
            case Defer(task_id, reason):
                live = self._live.get(task_id)
                if live is not None:
                    live.waits.setdefault(reason, now_s)
                    live.reason = reason
            case Reject(task_id, code, message):
                live = self._live.pop(task_id, None)
                if live is not None:
                    decision = self._keep(Decision(self._num_made + 1, now_s, self._policy, live.task, "", live.waits))
                    decision.refusal = f"{code}: {message}"
                    decision.outcome = Outcome(Fate.REFUSED, ended_s=now_s)
            case CancelOnNode(task_id):
                live = self._live.get(task_id)
                if live is not None:
                    live.cancelled = True
            case Drop(task_id):
                self._live.pop(task_id, None)
            case _:
                pass

    def _assigned(self, now_s: float, live: _Live, command: Assign) -> None:
        decision = Decision(self._num_made + 1, now_s, self._policy, live.task, command.node_id, live.waits)
        decision.terms, decision.parts = command.terms, command.parts
        decision.kv_shares = tuple([self._kv_share(terms.node_id) for terms in command.terms])
        self._put(live, command.node_id)
        live.decision = self._keep(decision)
        live.waits = {}

    def _keep(self, decision: Decision) -> Decision:
        self._num_made += 1
        self._kept.append(decision)
        return decision

    def _put(self, live: _Live, node_id: str) -> None:
        live.node_id = node_id
        node = self._nodes.get(node_id)
        if node is not None:
            node.kv_promised_tokens += _kv_tokens(live.task)

    def _kv_share(self, node_id: str) -> float:
        node = self._nodes.get(node_id)
        return 0.0 if node is None else node.kv_promised_tokens / node.kv_capacity_tokens


def _kv_tokens(task: Task) -> int:
    return task.prompt_tokens + task.max_tokens if isinstance(task, InferenceTask) else 0
