"""The newest decisions of a core: the terms behind each, joined later with what really happened.

Memory is bounded by the newest decisions kept plus the work that is live in the core.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Final

from services.latency import OpKind
from services.scheduler.core.commands import Assign, Reject
from services.scheduler.core.events import OpFinished, TaskEnded
from services.scheduler.explain.live import Live, LiveTasks
from services.scheduler.explain.types import Decision, Fate, Outcome

DEFAULT_CAPACITY: Final = 4096

_FORWARDS: Final = (OpKind.PREFILL, OpKind.DECODE, OpKind.TRAIN_FORWARD)


class Decisions:
    """The newest `capacity` decisions of one core, whose `tasks` it watches.

    Raises ValueError when `capacity` is not at least 1.
    """

    def __init__(self, tasks: LiveTasks, policy: str, capacity: int = DEFAULT_CAPACITY) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self._tasks = tasks
        self._policy = policy
        self._capacity = capacity
        self._num_made = 0
        self._kept: deque[Decision] = deque(maxlen=capacity)
        tasks.watch(self)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def capacity(self) -> int:
        """Most decisions kept."""
        return self._capacity

    def newest(self, limit: int) -> list[Decision]:
        """The newest decisions first, at most `limit`."""
        return list(islice(reversed(self._kept), limit))

    def of_task(self, task_id: str) -> list[Decision]:
        """What is kept about a task, oldest first: more than one decision when it lost its node."""
        return [decision for decision in self._kept if decision.task.task_id == task_id]

    def is_live(self, task_id: str) -> bool:
        """Whether a task waits or is on a node."""
        return self._tasks.get(task_id) is not None

    def waits(self, task_id: str) -> Mapping[str, float]:
        """Why a task waits now: reason -> since when, seconds. Empty: it does not wait."""
        live = self._tasks.get(task_id)
        return {} if live is None or live.node_id or not live.waits else {live.reason: live.waits[live.reason]}

    # ------------------------------------------------------------- what the tasks tell

    def arrived(self, live: Live) -> None:
        """Nothing is decided yet."""

    def placed(self, now_s: float, live: Live, command: Assign | None) -> None:
        """A decision, if this scheduler made it."""
        if command is None:
            return
        decision = Decision(self._num_made + 1, now_s, self._policy, live.task, command.node_id, live.waits)
        decision.terms, decision.parts = command.terms, command.parts
        decision.kv_shares = tuple([self._kv_share(terms.node_id) for terms in command.terms])
        live.decision = self._keep(decision)
        live.waits = {}

    def deferred(self, now_s: float, live: Live, reason: str) -> None:
        """A reason to wait, and since when."""
        live.waits.setdefault(reason, now_s)
        live.reason = reason

    def op_finished(self, op: OpFinished, lives: Sequence[Live]) -> None:
        """What came of decisions so far."""
        node = self._tasks.node(op.node_id)
        if node is None:
            return
        is_forward_end = op.stage == node.top_stage and op.part + 1 == op.parts and op.op in _FORWARDS
        begin_s, end_s, is_first_token = op.begin_s, op.end_s, op.first_token
        for live in lives:
            decision = live.decision
            if decision is None:
                continue
            outcome = decision.outcome
            if outcome.first_op_s is None or begin_s < outcome.first_op_s:
                outcome.first_op_s = begin_s
            if is_forward_end:
                outcome.forward_end_s = end_s
                if is_first_token and outcome.first_token_s is None:
                    outcome.first_token_s = end_s

    def left(self, now_s: float, live: Live, ended: TaskEnded | None) -> None:
        """What came of a decision in the end."""
        if live.decision is None:
            return
        outcome = live.decision.outcome
        outcome.ended_s = now_s
        if ended is None:
            outcome.fate = Fate.NODE_LOST
        else:
            outcome.fate = Fate.OK if ended.ok else Fate.CANCELLED if live.cancelled else Fate.FAILED
            outcome.output_tokens = ended.output_tokens
        live.decision = None

    def refused(self, now_s: float, live: Live, command: Reject) -> None:
        """A decision for no node."""
        decision = self._keep(Decision(self._num_made + 1, now_s, self._policy, live.task, "", live.waits))
        decision.refusal = f"{command.code}: {command.message}"
        decision.outcome = Outcome(Fate.REFUSED, ended_s=now_s)

    def cancelled(self, live: Live) -> None:
        """The end of the task tells what came of it."""

    def _keep(self, decision: Decision) -> Decision:
        self._num_made += 1
        self._kept.append(decision)
        return decision

    def _kv_share(self, node_id: str) -> float:
        node = self._tasks.node(node_id)
        return 0.0 if node is None else node.kv_share
