"""Predicted time to first token by running a copy of the node's core ahead in virtual time, with its latency models.

What the node will do is then what the same code does here: batch composition, order of the queues, the rest of what
runs, pieces of training, pending optimizer steps. What nobody can know is left out: work that comes later (also
training that waits in the scheduler until the node has ended other training) and real durations; for output lengths the
expected one is taken. The time per token stays with arithmetic: it is made of what comes while the request decodes, of
which running ahead knows nothing.
"""

import math
from collections.abc import Sequence

from services.latency import DECODE, PREFILL
from services.node_agent.core.types import Command, Event, Op, OpDone, RequestArrived, RunOp, Tick
from services.scheduler.core.costs import NodeCosts
from services.scheduler.core.node_mirror import NodeMirror, Running, node_request
from services.scheduler.core.response import Response, predict_response
from services.scheduler.core.state import Cluster, LiveInference, NodeState

#: Events run ahead at most; a request that waits longer is predicted by arithmetic.
MAX_EVENTS = 256
_INFERENCE = (PREFILL, DECODE)


def predict_ahead(
    now_s: float, live: LiveInference, node: NodeState, cluster: Cluster, cached_tokens: int = 0
) -> Response:
    """`predict_response`, with the TTFT from running the node ahead if it is mirrored and has work to do."""
    response = predict_response(now_s, live, node, cluster, cached_tokens)
    mirror = node.mirror
    if mirror is None:
        return response
    if not (node.inference or node.training or node.spec.max_batch_tokens):
        return Response(response.ttft_s + mirror.delay_s + mirror.handover_s, response.tpot_s, response.place_s)
    ahead = _Ahead(now_s, live, node, cluster, mirror)
    first_s = ahead.first_token_s()
    if first_s is None:
        return response
    return Response(first_s - live.task.arrival_s, response.tpot_s, response.place_s, ahead.demoted_s(first_s))


class _Ahead:
    """One run ahead."""

    __slots__ = (
        "_core",
        "_costs",
        "_ends_s",
        "_handover_s",
        "_left",
        "_node",
        "_now_s",
        "_outputs",
        "_pending",
        "_prefilled",
        "_running",
        "_task",
        "_top",
    )

    def __init__(
        self, now_s: float, live: LiveInference, node: NodeState, cluster: Cluster, mirror: NodeMirror
    ) -> None:
        self._task = live.task
        self._node = node
        self._costs = node.costs
        self._outputs = cluster.outputs
        self._core, self._running, pending = mirror.fork(now_s)
        self._top = node.costs.num_stages - 1
        self._now_s = mirror.known_s
        at_s = now_s + mirror.delay_s
        #: By time, the next one last.
        self._pending: list[tuple[float, Event]] = [*pending, (at_s, RequestArrived(node_request(live)))][::-1]
        # An operation without a trace has not ended before one could have come.
        told_s = now_s - mirror.lag_s
        self._handover_s = mirror.handover_s
        self._ends_s = [
            math.inf if running is None else max(told_s, self._end_s(stage, running))
            for stage, running in enumerate(self._running)
        ]
        #: Tokens that a request has still to produce, as far as it was looked at.
        self._left: dict[str, float] = {}
        #: Requests that got their first token.
        self._prefilled: set[str] = set()

    def first_token_s(self) -> float | None:
        """When the request gets its first token; None: not within `MAX_EVENTS`."""
        for _ in range(MAX_EVENTS):
            if not self._next():
                return None
            if self._task.task_id in self._prefilled:
                return self._now_s
        return None

    def demoted_s(self, first_s: float) -> float:
        """Prefills that come after the request's because their promise is broken before, in time on a stage."""
        waiting_s = [
            live.prefill_s
            for task_id, live in self._node.inference.items()
            if (live.is_demoted or live.deadline_s < first_s)
            and not live.has_first_token
            and task_id not in self._prefilled
        ]
        return sum(waiting_s) / self._costs.num_stages

    def _next(self) -> bool:
        """Let the next thing happen; False when nothing will."""
        ends_s = self._ends_s
        end_s = min(ends_s)
        wakeup_s = self._core.next_wakeup_s
        due_s = end_s if wakeup_s is None else min(end_s, max(wakeup_s, self._now_s))
        if self._pending and self._pending[-1][0] <= due_s:
            self._step(*self._pending.pop())
        elif due_s == math.inf:
            return False
        elif due_s < end_s:
            self._step(due_s, Tick())
        else:
            self._op_ends(end_s, self._first_begun(end_s) if ends_s.count(end_s) > 1 else ends_s.index(end_s))
        return True

    def _first_begun(self, end_s: float) -> int:
        """Stage of the operation that began first of those that end at the same time."""
        begins_s = [
            math.inf if running is None or self._ends_s[stage] != end_s else running.begin_s
            for stage, running in enumerate(self._running)
        ]
        return begins_s.index(min(begins_s))

    def _op_ends(self, end_s: float, stage: int) -> None:
        running = self._running[stage]
        if running is None:
            return
        op = running.op
        self._running[stage] = None
        self._ends_s[stage] = math.inf
        stopped: tuple[str, ...] = ()
        if stage == self._top and op.kind in _INFERENCE:
            stopped = self._stopped(op)
            if op.kind is PREFILL:
                self._prefilled.update(op.first_ids)
        self._step(end_s, OpDone(stage, op.op_id, stopped))

    def _step(self, at_s: float, event: Event) -> None:
        self._now_s = max(self._now_s, at_s)
        self._perform(self._core.step(self._now_s, event))

    def _perform(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if type(command) is RunOp:
                running = self._running[command.stage] = Running(command.op, self._now_s)
                self._ends_s[command.stage] = self._end_s(command.stage, running)

    def _end_s(self, stage: int, running: Running) -> float:
        return running.begin_s + self._handover_s + duration_s(self._costs, stage, running.op)

    def _stopped(self, op: Op) -> tuple[str, ...]:
        """Requests that are expected to end with this token."""
        ended = []
        for task_id in op.task_ids if op.kind is DECODE else op.first_ids + op.decode_ids:
            left = self._left.get(task_id)
            if left is None:
                left = self._expected_tokens(task_id)
            self._left[task_id] = left = left - 1.0
            if left <= 0.0:
                ended.append(task_id)
        return tuple(ended)

    def _expected_tokens(self, task_id: str) -> float:
        live = self._node.inference.get(task_id)
        if live is None:
            return self._outputs.expected_tokens(self._task)
        produced = 1 + live.context_tokens - live.task.prompt_tokens if live.has_first_token else 0
        # Who has outlived the expectation is taken to need one more token.
        return max(1.0, self._outputs.expected_tokens(live.task) - produced)


def duration_s(costs: NodeCosts, stage: int, op: Op) -> float:
    """Predicted duration of an operation on a stage."""
    batch = op.batch
    if not batch:
        return costs.stage_s(stage, op.kind, 1, 1, job_id=op.subject)
    if op.kind is DECODE:
        tokens, cached = op.context_tokens, 0
    else:
        tokens, cached = op.num_tokens, op.context_tokens
    op_s = costs.stage_s(stage, op.kind, batch, tokens / batch, cached / batch, op.subject) / op.parts
    if op.decodes:
        decode_s = costs.stage_s(stage, DECODE, op.decodes, op.decode_context_tokens / op.decodes)
        return costs.mixed_s(stage, op_s, decode_s)
    return op_s
