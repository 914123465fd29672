"""Separate clusters, the baseline of the paper: some nodes serve, the others train, checkpoints are copied across."""

from collections.abc import Sequence

from services.scheduler.core.policies.base import (
    InTurn,
    Options,
    Placement,
    TrainingPlacement,
    check_options,
)
from services.scheduler.core.state import Cluster, LiveInference, LiveTraining, NodeState
from services.scheduler.core.types import NodeRole, QueueOrder, SyncMode


class Separate:
    """The first half of the nodes by id (at least one) serve, the rest train; requests and micro-batches go in turn.

    A single node does both. Serving nodes get the weights of the trainer with most steps (REPLACE).
    """

    queue_order = QueueOrder.FIFO
    sync_mode = SyncMode.REPLACE
    uses_forecast = False

    def __init__(self, options: Options) -> None:
        check_options("separate", options, {})
        self._in_turn = InTurn()

    def roles(self, node_ids: Sequence[str]) -> dict[str, NodeRole]:
        """Static split."""
        if len(node_ids) == 1:
            return {node_ids[0]: NodeRole.BOTH}
        num_serving = max(1, len(node_ids) // 2)
        return {
            node_id: NodeRole.SERVE if index < num_serving else NodeRole.TRAIN for index, node_id in enumerate(node_ids)
        }

    def place_inference(
        self, now_s: float, live: LiveInference, candidates: Sequence[NodeState], cluster: Cluster
    ) -> Placement:
        """The next serving node in turn."""
        del now_s, live, cluster
        return self._in_turn.request(candidates)

    def place_training(
        self, now_s: float, live: LiveTraining, candidates: Sequence[NodeState], cluster: Cluster, *, may_hold: bool
    ) -> TrainingPlacement:
        """The next training node in turn."""
        del now_s, live, cluster, may_hold
        return self._in_turn.microbatch(candidates)
