"""NaiveMix of the paper: every node serves and trains, work goes in turn, stage queues are first come first served."""

from collections.abc import Sequence

from services.scheduler.core.policies.base import InTurn, Options, Placement, TrainingPlacement
from services.scheduler.core.policies.mixed import Mixed
from services.scheduler.core.state import Cluster, LiveInference, LiveTraining, NodeState


class RoundRobin(Mixed):
    """Requests in turn and micro-batches in turn over all nodes; predicts nothing and holds nothing back."""

    def __init__(self, options: Options) -> None:
        super().__init__("round_robin", options)
        self._in_turn = InTurn()

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
