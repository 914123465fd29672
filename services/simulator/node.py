"""A virtual node: the production node core, with durations from latency models instead of an engine.

What the node's other stages run when an operation begins slows it down by the share that the profile measured, if it
did. Approximate in two ways: what begins or ends on them meanwhile changes nothing any more, and of several stages each
counts as its part of the slowdown that was measured with all of them busy.
"""

import math
from collections.abc import Mapping
from random import Random

from services.latency import DECODE, PREFILL, LatencyModel, OpKind
from services.node_agent.core.node import NodeCore
from services.node_agent.core.types import Op, QueueOrder
from services.scheduler.core.costs import NodeCosts
from services.simulator.types import SimulationConfig, VirtualNode

_INFERENCE = (PREFILL, DECODE)
#: A noisy duration stays above this share of the modelled one.
_SHORTEST = 0.1


class SimNode:
    """One life of a node; after a loss, a node of the same name is another object."""

    __slots__ = (
        "_costs",
        "_cut_overhead",
        "_noise",
        "_random",
        "_remaining",
        "_running",
        "alive",
        "core",
        "node_id",
        "spec",
        "timer_s",
        "top",
    )

    def __init__(self, spec: VirtualNode, order: QueueOrder, config: SimulationConfig, random: Random) -> None:
        self.spec = spec
        self.node_id = spec.node_id
        default = config.core.default_slo
        self.core = NodeCore(spec.core.ordered(order, default.ttft_s, default.tpot_s))
        self.top = spec.core.num_stages - 1
        self.alive = True
        #: When the pending timer fires; None: no timer.
        self.timer_s: float | None = None
        self._costs = NodeCosts(spec.latency)
        self._noise = [_noise(stage, config.noise) for stage in spec.latency.models]
        self._cut_overhead = config.cut_overhead
        self._random = random
        #: Tokens a request has still to produce.
        self._remaining: dict[str, int] = {}
        #: By stage, what runs there; None: nothing.
        self._running: list[OpKind | None] = [None] * spec.core.num_stages

    def took(self, task_id: str, output_tokens: int) -> None:
        """A request came whose output will have this many tokens."""
        self._remaining[task_id] = output_tokens

    def begin(self, stage: int, op: Op) -> float:
        """An operation begins on an idle stage; it will take so many seconds."""
        duration_s = self.duration_s(stage, op)
        busy = (kind for kind in self._running if kind is not None)
        duration_s *= 1.0 + self.spec.latency.slowdown_beside(stage, op.kind, busy)
        self._running[stage] = op.kind
        return duration_s

    def end(self, stage: int) -> None:
        """The operation on a stage ended."""
        self._running[stage] = None

    def _move_s(self, stage: int, op: Op) -> float:
        spec = self.spec
        if spec.latency.host_links and spec.host_link_bytes_per_s == math.inf:
            return spec.latency.host_links[stage].move_s(op.kind, op.num_bytes)
        return op.num_bytes / spec.host_link_bytes_per_s

    def duration_s(self, stage: int, op: Op) -> float:
        """How long an operation takes on a stage whose neighbours are idle."""
        if op.num_bytes:
            return self._move_s(stage, op)
        batch = op.batch
        if batch:
            if op.kind is DECODE:
                tokens, cached = op.context_tokens, 0
            else:
                tokens, cached = op.num_tokens, op.context_tokens
            duration_s = self._costs.stage_s(stage, op.kind, batch, tokens / batch, cached / batch)
        else:
            duration_s = self._costs.stage_s(stage, op.kind, 1, 1)
        if op.decodes:
            contexts = op.decode_context_tokens / op.decodes
            decode_s = self._costs.stage_s(stage, DECODE, op.decodes, contexts)
            duration_s = self.spec.latency.mixed_s(stage, duration_s, decode_s)
        if op.parts > 1:
            duration_s *= (1.0 + self._cut_overhead) / op.parts
        noise = self._noise[stage][op.kind]
        if noise:
            duration_s *= max(_SHORTEST, 1.0 + noise * self._random.gauss(0.0, 1.0))
        return duration_s

    def stopped(self, stage: int, op: Op) -> tuple[str, ...]:
        """Requests that produced their last token with this operation."""
        if stage != self.top or op.kind not in _INFERENCE:
            return ()
        ended = []
        remaining = self._remaining
        for task_id in op.task_ids if op.kind is DECODE else op.first_ids + op.decode_ids:
            left = remaining.get(task_id, 1) - 1
            remaining[task_id] = left
            if left <= 0:
                ended.append(task_id)
        return tuple(ended)

    def left(self, task_id: str) -> None:
        """A task left the node."""
        self._remaining.pop(task_id, None)


def _noise(models: Mapping[OpKind, LatencyModel], noise: float | None) -> dict[OpKind, float]:
    """Relative standard deviation of durations by kind: the one that was asked for, or each model's own."""
    if noise is not None:
        return dict.fromkeys(OpKind, noise)
    return {kind: models[kind].noise if kind in models else 0.0 for kind in OpKind}
