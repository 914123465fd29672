"""LeMix's own policy: pack and spill, one training stream per node, hold-back with a starvation bound."""

import math
from collections.abc import Sequence

from services.latency import OpKind
from services.scheduler.core.policies.base import (
    Options,
    Placement,
    TrainingPlacement,
    check_options,
    every_node,
)
from services.scheduler.core.response import predict_response
from services.scheduler.core.state import Cluster, LiveInference, LiveTraining, NodeState
from services.scheduler.core.types import NodeRole, NodeTerms, QueueOrder, SyncMode

#: Held-back training is looked at again after this long even if nothing happens.
_RETRY_S = 0.05


class LeMix:
    """Requests go to the first node, by id, whose predicted response keeps the promise; the others stay free.

    slo_fraction: share of the TTFT and TPOT promise the prediction may use up before the next node is opened: smaller
    spreads earlier. slo_units: promise assumed for requests without one, in units of their response on an idle node.
    """

    queue_order = QueueOrder.INFERENCE_FIRST
    sync_mode = SyncMode.AVERAGE
    uses_forecast = False

    def __init__(self, options: Options) -> None:
        values = check_options("lemix", options, {"slo_fraction": 0.6, "slo_units": 5.0})
        self._slo_fraction = values["slo_fraction"]
        self._slo_units = values["slo_units"]

    def roles(self, node_ids: Sequence[str]) -> dict[str, NodeRole]:
        """Every node does both."""
        return every_node(NodeRole.BOTH, node_ids)

    def place_inference(
        self, now_s: float, live: LiveInference, candidates: Sequence[NodeState], cluster: Cluster
    ) -> Placement:
        """The first node that keeps the promise; else the one that comes closest to it."""
        terms = []
        best = 0
        for index, node in enumerate(candidates):
            response = predict_response(now_s, live, node, cluster)
            ttft_s, tpot_s = self._promise(live, node, cluster)
            stress = max(response.ttft_s / ttft_s, response.tpot_s / tpot_s)
            # Above 0 for nodes that keep the promise, the earlier the higher; below 0 for those that do not.
            score = 1.0 / (1 + index) if stress <= self._slo_fraction else -stress
            terms.append(NodeTerms(node.spec.node_id, 0.0, response.ttft_s, 0.0, 0.0, score))
            if score > terms[best].score:
                best = index
        return Placement(candidates[best], tuple(terms))

    def place_training(
        self, now_s: float, live: LiveTraining, candidates: Sequence[NodeState], cluster: Cluster, *, may_hold: bool
    ) -> TrainingPlacement:
        """The node with the shortest stream, among those where it breaks no promise."""
        held = [node for node in candidates if may_hold and self._overrun_s(now_s, live, node, cluster) > 0.0]
        allowed = [node for node in candidates if node not in held] if held else candidates
        if not allowed:
            return TrainingPlacement(None, held_back=held, retry_s=now_s + _RETRY_S)
        chosen = min(allowed, key=lambda node: node.num_outstanding_training)
        terms = tuple(
            NodeTerms(node.spec.node_id, 0.0, 0.0, 0.0, 0.0, float(-node.num_outstanding_training)) for node in allowed
        )
        return TrainingPlacement(chosen, terms, held_back=held, retry_s=now_s + _RETRY_S)

    def _promise(self, live: LiveInference, node: NodeState, cluster: Cluster) -> tuple[float, float]:
        """(TTFT, TPOT) the request is to keep, seconds."""
        task, default = live.task, cluster.config.default_slo
        ttft_s = task.slo.ttft_s if task.slo.ttft_s is not None else default.ttft_s
        tpot_s = task.slo.tpot_s if task.slo.tpot_s is not None else default.tpot_s
        if ttft_s is None:
            ttft_s = self._slo_units * node.costs.node_s(OpKind.PREFILL, 1, task.prompt_tokens)
        if tpot_s is None:
            tpot_s = self._slo_units * node.costs.node_s(OpKind.DECODE, 1, task.prompt_tokens)
        # A promise of 0 (or none, on a node without a profile) cannot rank nodes.
        return ttft_s or math.inf, tpot_s or math.inf

    def _overrun_s(self, now_s: float, live: LiveTraining, node: NodeState, cluster: Cluster) -> float:
        """Largest overrun that one more training operation causes to requests here or expected here (Eq. 4, LeMix)."""
        op_s = node.costs.training_op_s(live.task.batch, live.task.length)
        overrun_s = -math.inf
        if node.num_prefilling:
            first_tokens = [other for other in node.inference.values() if not other.has_first_token]
            first_tokens.sort(key=lambda other: other.deadline_s)
            at_s = now_s + op_s
            for other in first_tokens:
                at_s += other.prefill_s / node.costs.num_stages
                overrun_s = max(overrun_s, at_s - other.deadline_s)
        ttft_s = cluster.config.default_slo.ttft_s
        if ttft_s is not None and self._expects_inference(now_s, node, cluster):
            own_s = node.costs.node_s(OpKind.PREFILL, 1, cluster.prompts.mean)
            overrun_s = max(overrun_s, op_s + own_s - ttft_s)
        return overrun_s

    def _expects_inference(self, now_s: float, node: NodeState, cluster: Cluster) -> bool:
        """Whether requests keep arriving and this is a node they go to."""
        if cluster.arrivals.gap_s(now_s) > cluster.config.max_hold_back_s:
            return False
        return bool(node.inference) or node is cluster.serving[0]
