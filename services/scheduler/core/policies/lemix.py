"""LeMix's own policy: as few nodes as keep the promise, training on what they leave, cut so that it blocks nobody."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from services.latency import DECODE, PREFILL
from services.scheduler.core.commands import NodeTerms, SyncMode
from services.scheduler.core.events import Event, NodeJoined, NodeProfiled
from services.scheduler.core.fast_forward import predict_ahead
from services.scheduler.core.hold_back import overrun_s
from services.scheduler.core.node_mirror import NodeMirror
from services.scheduler.core.node_spec import NodeRole, QueueOrder
from services.scheduler.core.policies.base import (
    Options,
    Placement,
    TrainingPlacement,
    check_choice,
    check_options,
    every_node,
)
from services.scheduler.core.policies.mean_costs import MeanCosts
from services.scheduler.core.response import predict_iteration_s, predict_response
from services.scheduler.core.state import Cluster, LiveInference, LiveTraining, NodeState

#: Held-back training is looked at again after this long even if nothing happens.
_RETRY_S = 0.05

#: A stress of this many times `open_at` opens nodes without waiting.
_BURST = 2.0

#: Nodes run ahead in one decision, the first ones looked at; arithmetic is enough to see that the others are no better.
_MOST_AHEAD = 4

_OPTIONS = {
    "slo_fraction": 0.5,
    "open_at": 1.0,
    "dwell_s": 1.0,
    "backlog_s": 12.0,
    "cut": 0.5,
    "consistency": 0.0,
    "slo_units": 5.0,
    "demotion": 12.0,
    "sessions": True,
    "per_node": True,
}


class _Look(NamedTuple):
    """A request on a node, as predicted. breaks_ttft: even with a place in the batches at once."""

    node: NodeState
    stress: float
    terms: NodeTerms
    breaks_ttft: bool


class LeMix:
    """Nodes are opened and closed by prediction alone, the fastest first, nodes alike in the order of their ids.

    A request's stress on a node is its predicted response over its promise. It goes to the first open node whose stress
    is at most `slo_fraction`, else to the least stressed. If that one's is above `open_at`, a node more is opened; for
    a promise that no node could keep, only above twice the stress on an idle one. Every `dwell_s` one may open, in a
    burst several, and one close. Nodes that train are open anyway. With `sessions` the next turn of a session is
    predicted without the prefill of what a node keeps of the turns before. With room to spare the share of the prefill
    that it saves counts as much as being first; a closed node is looked at as well if it has work and is held anyway.
    A request that is predicted to break its time to first token is queued as if it had been promised `demotion` times
    that (0: as it was promised), so that those after it keep theirs. Not when what it lacks is a place in the batches:
    those come in turn, and whoever is passed waits for one more.

    Training runs on one node per `backlog_s` of predicted work, on all of them when there is more than the core can
    see, and goes to the shortest stream. Its operations are cut to `cut` of the mean prefill where the runtime can do
    that, and so that requests that decode keep their TPOT (0: never cut). consistency: weight of length consistency
    (0-1) against stress. slo_units: promise assumed for requests without one, in units of their response on an idle
    node. forecast: "analytic", or "fast_forward" to predict first tokens by running up to four nodes ahead. per_node:
    false predicts nodes of all speeds by the same mean coefficients (an ablation).
    """

    queue_order = QueueOrder.INFERENCE_FIRST
    sync_mode = SyncMode.AVERAGE
    uses_forecast = False
    fastest_first = True

    def __init__(self, options: Options) -> None:
        values = check_options("lemix", options, _OPTIONS, ("forecast",))
        forecast = check_choice("lemix", options, "forecast", ("analytic", "fast_forward"))
        self._mirrors = forecast == "fast_forward"
        #: Nodes that may still be run ahead in this decision.
        self._num_ahead = 0
        self._slo_fraction = values["slo_fraction"]
        self._open_at = values["open_at"]
        self._dwell_s = values["dwell_s"]
        self._backlog_s = values["backlog_s"]
        self._cut = values["cut"]
        self._consistency = values["consistency"]
        #: With so little stress on a node, the others need not be looked at.
        self._enough = -math.inf if self._consistency else min(self._slo_fraction, self._open_at)
        self._slo_units = values["slo_units"]
        self._demotion = values["demotion"]
        self._sessions = bool(values["sessions"])
        self._per_node = bool(values["per_node"])
        self._num_open = 1
        self._opened_s = self._changed_s = -math.inf

    def roles(self, node_ids: Sequence[str]) -> dict[str, NodeRole]:
        """Every node does both."""
        return every_node(NodeRole.BOTH, node_ids)

    def observe(self, now_s: float, event: Event, cluster: Cluster) -> bool:
        """Follow the nodes that join, to run them ahead; take new profiles into the mean ones."""
        if type(event) is not NodeJoined and type(event) is not NodeProfiled:
            return False
        if not self._per_node:
            nodes = list(cluster.nodes.values())
            for node, costs in zip(nodes, MeanCosts.of_nodes([node.spec.latency for node in nodes]), strict=True):
                node.costs = costs
        if self._mirrors and type(event) is NodeJoined:
            node = cluster.nodes[event.node.node_id]
            node.mirror = NodeMirror(now_s, node, self.queue_order, cluster.config.default_slo)
        return not self._per_node

    # ----------------------------------------------------------------- requests

    def place_inference(
        self, now_s: float, live: LiveInference, candidates: Sequence[NodeState], cluster: Cluster
    ) -> Placement:
        """The first open node that keeps the promise with room to spare; else the least stressed."""
        self._num_ahead = _MOST_AHEAD if self._mirrors else 0
        num_training = self._num_training(cluster) if cluster.backlog_s else 0
        open_nodes = candidates[: max(self._num_open, num_training)]
        looks: list[_Look] = []
        for index, node in enumerate(open_nodes):
            looks.append(self._look(now_s, live, node, index, cluster))
            if looks[-1].stress <= self._enough:
                break  # nobody behind it could win
        if self._closes(now_s, looks):
            self._num_open -= 1
            self._changed_s = now_s
            del looks[max(self._num_open, num_training) :]
        keeper = self._keeper(now_s, live, candidates, len(looks), max(self._num_open, num_training), cluster)
        best = max(looks + keeper, key=_score)
        is_calm = min(look.stress for look in looks) <= self._enough
        closed = candidates[len(looks) :]
        if closed and not is_calm and self._opens(now_s, live, best, closed[0], cluster):
            looks.append(self._look(now_s, live, closed[0], len(looks), cluster))
            keeper = [look for look in keeper if look.node is not closed[0]]
            best = max(looks + keeper, key=_score)
            self._num_open = len(looks)
            self._changed_s = self._opened_s = now_s
        terms = tuple(look.terms for look in looks + keeper)
        is_demoted = bool(self._demotion) and best.breaks_ttft
        ttft_s = self._queue_ttft_s(live, best.node, cluster, is_demoted=is_demoted)
        return Placement(best.node, terms, best.terms.cached_tokens, ttft_s, is_demoted)

    def _queue_ttft_s(
        self, live: LiveInference, node: NodeState, cluster: Cluster, *, is_demoted: bool
    ) -> float | None:
        """What the request is queued by, None: its own promise. A promise assumed here is told too: the node would
        assume another."""
        ttft_s, _ = self._promise(live, node, cluster)
        if is_demoted:
            return self._demotion * ttft_s
        return ttft_s if live.task.slo.ttft_s is None and ttft_s < math.inf else None

    def _keeper(
        self,
        now_s: float,
        live: LiveInference,
        candidates: Sequence[NodeState],
        num_looks: int,
        num_open: int,
        cluster: Cluster,
    ) -> list[_Look]:
        """The node that keeps the session's KV cache, if it was not among the first `num_looks`: an open one, or a
        closed one that has work and so is held anyway."""
        keeper = cluster.sessions.keeper(live.task.session_id) if self._sessions else None
        if keeper is None or keeper not in candidates[num_looks:]:
            return []
        index = candidates.index(keeper)
        if index >= num_open and not (keeper.inference or keeper.training):
            return []
        return [self._look(now_s, live, keeper, index, cluster)]

    def _look(self, now_s: float, live: LiveInference, node: NodeState, index: int, cluster: Cluster) -> _Look:
        cached_tokens = cluster.sessions.cached_tokens(live, node) if self._sessions else 0
        predict = predict_ahead if self._num_ahead > 0 else predict_response
        self._num_ahead -= 1
        response = predict(now_s, live, node, cluster, cached_tokens)
        ttft_s, tpot_s = self._promise(live, node, cluster)
        breaks_ttft = response.ttft_s - response.place_s > ttft_s
        stress = (response.ttft_s + breaks_ttft * response.demoted_s) / ttft_s
        if live.task.max_tokens > 1:
            stress = max(stress, response.tpot_s / tpot_s)
        # Above 0 for nodes with room to spare, the earlier the higher; below 0 for the others.
        score = 1.0 / (1 + index) if stress <= self._slo_fraction else -stress
        if cached_tokens and score > 0.0:
            score += _saved_share(live, node, cached_tokens)
        consistency = 0.0
        if self._consistency:
            consistency = node.lengths.consistency(live.task.prompt_tokens)
            score += self._consistency * consistency
        node_id, ttft_s, tpot_s = node.spec.node_id, response.ttft_s, response.tpot_s
        terms = NodeTerms(node_id, 0.0, ttft_s, 0.0, consistency, score, cached_tokens, tpot_s)
        return _Look(node, stress, terms, breaks_ttft)

    def _closes(self, now_s: float, looks: Sequence[_Look]) -> bool:
        """Whether the request could do without the last open node."""
        if self._num_open == 1 or now_s - self._changed_s < self._dwell_s:
            return False
        return min(look.stress for look in looks[: self._num_open - 1]) <= self._open_at

    def _opens(self, now_s: float, live: LiveInference, best: _Look, closed: NodeState, cluster: Cluster) -> bool:
        """Whether a node more is worth it: the best open one is too stressed, and the last one opened had time to help,
        unless this is a burst."""
        limit = self._limit(live, closed, cluster)
        return best.stress > limit and (now_s - self._opened_s >= self._dwell_s or best.stress > _BURST * limit)

    def _limit(self, live: LiveInference, node: NodeState, cluster: Cluster) -> float:
        """Stress above which a node is opened. A promise that even an idle node breaks is no reason to open one; then
        twice what an idle node does is."""
        ttft_s, tpot_s = self._promise(live, node, cluster)
        costs, prompt = node.costs, live.task.prompt_tokens
        alone = costs.node_s(PREFILL, 1, prompt) / ttft_s
        if live.task.max_tokens > 1:
            alone = max(alone, costs.node_s(DECODE, 1, prompt) / tpot_s)
        return self._open_at if alone <= 1.0 else _BURST * max(alone, self._open_at)

    def _promise(self, live: LiveInference, node: NodeState, cluster: Cluster) -> tuple[float, float]:
        """(TTFT, TPOT) the request is to keep, seconds."""
        task, default = live.task, cluster.config.default_slo
        ttft_s = task.slo.ttft_s if task.slo.ttft_s is not None else default.ttft_s
        tpot_s = task.slo.tpot_s if task.slo.tpot_s is not None else default.tpot_s
        if ttft_s is None:
            ttft_s = self._slo_units * node.costs.node_s(PREFILL, 1, task.prompt_tokens)
        if tpot_s is None:
            tpot_s = self._slo_units * node.costs.node_s(DECODE, 1, task.prompt_tokens)
        # A promise of 0 (or none, on a node without a profile) cannot rank nodes.
        return ttft_s or math.inf, tpot_s or math.inf

    # ----------------------------------------------------------------- training

    def place_training(
        self, now_s: float, live: LiveTraining, candidates: Sequence[NodeState], cluster: Cluster, *, may_hold: bool
    ) -> TrainingPlacement:
        """The shortest stream among the nodes that train, where it breaks no promise."""
        if not may_hold and cluster.config.max_hold_back_s > 0.0:
            return self._placed(now_s, live, candidates, (), cluster)  # overdue
        training = set(cluster.training[: self._num_training(cluster)])
        in_use = [node for node in candidates if node in training]
        held = [node for node in in_use if may_hold and self._overruns(now_s, live, node, cluster)]
        allowed = [node for node in in_use if node not in held] if held else in_use
        if not allowed:
            return TrainingPlacement(None, held_back=held, retry_s=now_s + _RETRY_S)
        return self._placed(now_s, live, allowed, held, cluster, retry_s=now_s + _RETRY_S)

    def _placed(
        self,
        now_s: float,
        live: LiveTraining,
        allowed: Sequence[NodeState],
        held: Sequence[NodeState],
        cluster: Cluster,
        retry_s: float = math.inf,
    ) -> TrainingPlacement:
        chosen = min(allowed, key=lambda node: node.num_outstanding_training)
        terms = tuple(
            NodeTerms(node.spec.node_id, 0.0, 0.0, 0.0, 0.0, float(-node.num_outstanding_training)) for node in allowed
        )
        return TrainingPlacement(chosen, terms, held, retry_s, self._num_parts(now_s, live, chosen, cluster))

    def _num_training(self, cluster: Cluster) -> int:
        """How many nodes the backlog of training is worth, at least one."""
        num_nodes = len(cluster.training)
        # Whoever feeds the core tops it up when half is gone: with a quarter waiting there may be more behind it.
        if 4 * len(cluster.waiting_training) >= cluster.config.max_waiting_training or not self._backlog_s:
            return num_nodes
        return max(1, math.ceil(min(num_nodes, cluster.backlog_s / self._backlog_s)))

    def _num_parts(self, now_s: float, live: LiveTraining, node: NodeState, cluster: Cluster) -> int:
        """Pieces that are each at most `cut` of the mean prefill, and so short that requests that decode keep their
        promise when an iteration meets one on every stage."""
        most = node.spec.max_training_parts
        if most == 1 or not self._cut or not cluster.prompts.count:
            return 1
        costs, prompt = node.costs, cluster.prompts.mean
        blocked_s = self._cut * costs.node_s(PREFILL, 1, prompt)
        tpot_s = cluster.config.default_slo.tpot_s
        if tpot_s is not None and cluster.outputs.mean_tokens > 1.0:
            blocked_s = min(blocked_s, tpot_s - predict_iteration_s(now_s, node, prompt))
        if blocked_s <= 0.0:
            return most
        op_s = costs.training_op_s(live.task.batch, live.task.length, live.task.job_id)
        return max(1, math.ceil(min(most, op_s * costs.num_stages / blocked_s)))

    def _overruns(self, now_s: float, live: LiveTraining, node: NodeState, cluster: Cluster) -> bool:
        """Whether an operation of the micro-batch would break a promise on the node."""
        op_s = node.costs.training_op_s(live.task.batch, live.task.length, live.task.job_id)
        return overrun_s(now_s, op_s / self._num_parts(now_s, live, node, cluster), node, cluster) > 0.0


def _saved_share(live: LiveInference, node: NodeState, cached_tokens: int) -> float:
    """Share of its prefill that a request saves on a node."""
    prompt_tokens = live.task.prompt_tokens
    whole_s = node.costs.node_s(PREFILL, 1, prompt_tokens)
    rest_s = node.costs.node_s(PREFILL, 1, prompt_tokens - cached_tokens, cached_tokens)
    return 1.0 - rest_s / whole_s if whole_s > 0.0 else 0.0


def _score(look: _Look) -> float:
    return look.terms.score
