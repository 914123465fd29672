"""NaiveMix of the paper: every node serves and trains, work goes in turn, stage queues are first come first served."""

from collections.abc import Sequence

from services.scheduler.core.policies.base import (
    InTurn,
    Options,
    Placement,
    TrainingPlacement,
    check_options,
    every_node,
)
from services.scheduler.core.state import Cluster, LiveInference, LiveTraining, NodeState
from services.scheduler.core.types import NodeRole, QueueOrder, SyncMode


class RoundRobin:
    """Requests in turn and micro-batches in turn over all nodes; predicts nothing and holds nothing back."""

    queue_order = QueueOrder.FIFO
    sync_mode = SyncMode.AVERAGE
    uses_forecast = False

    def __init__(self, options: Options) -> None:
        check_options("round_robin", options, {})
        self._in_turn = InTurn()

    def roles(self, node_ids: Sequence[str]) -> dict[str, NodeRole]:
        """Every node does both."""
        return every_node(NodeRole.BOTH, node_ids)

    def place_inference(
        self, now_s: float, live: LiveInference, candidates: Sequence[NodeState], cluster: Cluster
    ) -> Placement:
        """The next node in turn."""
        del now_s, live, cluster
        return self._in_turn.request(candidates)

    def place_training(
        self, now_s: float, live: LiveTraining, candidates: Sequence[NodeState], cluster: Cluster, *, may_hold: bool
    ) -> TrainingPlacement:
        """The next node in turn."""
        del now_s, live, cluster, may_hold
        return self._in_turn.microbatch(candidates)
