"""The score of the paper (Eq. 3) in its additive, corrected form, and its hold-back (Eq. 4).

score = IP + lambda_2 * LC - lambda_1 * R. The released research code divides by R instead; as IP is negative a larger R
then scores better, and lambda_1 only scales the whole. The sum keeps the meaning the paper gives to the three terms.
"""

from collections.abc import Sequence

from services.latency import OpKind
from services.scheduler.core.policies.base import (
    Options,
    Placement,
    TrainingPlacement,
    check_options,
    every_node,
    forecast_of,
)
from services.scheduler.core.state import Cluster, LiveInference, LiveTraining, NodeState
from services.scheduler.core.traces import forward_s_per_stage, training_s_per_stage
from services.scheduler.core.types import NodeRole, NodeTerms, QueueOrder, SyncMode

#: Training is held back when its own predicted response exceeds this many SLO units.
HOLD_BACK_UNITS = 5.0


class PaperAdditive:
    """Every node does both; the node with the highest score wins, of equals the lowest id. First come first served.

    lambda_1: weight of the response time R (per second). lambda_2: weight of the length consistency LC.
    tau_s: idleness that costs nothing (II / S - gap below it).
    """

    queue_order = QueueOrder.FIFO
    sync_mode = SyncMode.AVERAGE
    uses_forecast = True

    def __init__(self, options: Options) -> None:
        values = check_options("paper_additive", options, {"lambda_1": 0.15, "lambda_2": 0.05, "tau_s": 0.2})
        self._lambda_1 = values["lambda_1"]
        self._lambda_2 = values["lambda_2"]
        self._tau_s = values["tau_s"]

    def roles(self, node_ids: Sequence[str]) -> dict[str, NodeRole]:
        """Every node does both."""
        return every_node(NodeRole.BOTH, node_ids)

    def place_inference(
        self, now_s: float, live: LiveInference, candidates: Sequence[NodeState], cluster: Cluster
    ) -> Placement:
        """The node with the highest score."""
        task = live.task
        terms = tuple(
            self._terms(now_s, task.arrival_s, task.prompt_tokens, node, forward_s_per_stage(task, node, cluster))
            for node in candidates
        )
        return Placement(candidates[_best(terms)], terms)

    def place_training(
        self, now_s: float, live: LiveTraining, candidates: Sequence[NodeState], cluster: Cluster, *, may_hold: bool
    ) -> TrainingPlacement:
        """The node with the highest score, unless the micro-batch would respond too late even there (Eq. 4)."""
        task = live.task
        # The A-PP rule releases it now; how long its job's backlog has waited says nothing about the nodes.
        terms = tuple(
            self._terms(now_s, now_s, task.length, node, training_s_per_stage(task, node, OpKind.TRAIN_FORWARD))
            for node in candidates
        )
        best = _best(terms)
        limit_s = HOLD_BACK_UNITS * cluster.slo_unit_s
        response_s = terms[best].response_s
        if may_hold and 0.0 < limit_s < response_s and _inference_arrives(now_s, limit_s, cluster):
            return TrainingPlacement(None, held_back=candidates, retry_s=now_s + response_s - limit_s)
        return TrainingPlacement(candidates[best], terms)

    def _terms(
        self, now_s: float, release_s: float, length: int, node: NodeState, forward_s: Sequence[float]
    ) -> NodeTerms:
        forecast = forecast_of(node)
        path = forecast.compute_idleness(now_s, forward_s)
        profit_s = -max(path.idleness_s / len(forward_s) - forecast.gap_s(now_s), self._tau_s)
        response_s = path.end_s - release_s
        consistency = node.lengths.consistency(length)
        score = profit_s + self._lambda_2 * consistency - self._lambda_1 * response_s
        return NodeTerms(node.spec.node_id, path.idleness_s, response_s, profit_s, consistency, score)


def _best(terms: Sequence[NodeTerms]) -> int:
    """Index of the highest score; candidates are sorted by id, so the first of equals has the lowest."""
    best = 0
    for index in range(1, len(terms)):
        if terms[index].score > terms[best].score:
            best = index
    return best


def _inference_arrives(now_s: float, within_s: float, cluster: Cluster) -> bool:
    """Whether requests are being served, or came not long ago."""
    last_s = cluster.arrivals.last_s
    return cluster.num_live_inference > 0 or (last_s is not None and now_s - last_s <= within_s)
