"""Separate clusters, the baseline of the paper: some nodes serve, the others train, checkpoints are copied across."""

from collections.abc import Sequence

from services.scheduler.core.commands import SyncMode
from services.scheduler.core.node_spec import NodeRole, QueueOrder
from services.scheduler.core.policies.base import InTurn, Options, Placement, TrainingPlacement, check_options
from services.scheduler.core.state import Cluster, LiveInference, LiveTraining, NodeState


class Separate:
    """The first nodes by id serve, `serving_share` of all, the rest train; requests and micro-batches go in turn.

    At least one node on each side; a single node does both. Serving nodes get the weights of the trainer with most
    steps (REPLACE). one_stream: one training stream for the whole cluster, as in the research code: the next
    micro-batch leaves when the forward of the one before has left its first stage. Else every node has its own.
    """

    queue_order = QueueOrder.FIFO
    sync_mode = SyncMode.REPLACE
    uses_forecast = False
    fastest_first = False

    def __init__(self, options: Options) -> None:
        values = check_options("separate", options, {"serving_share": 0.5, "one_stream": False})
        self._serving_share = values["serving_share"]
        self._one_stream = bool(values["one_stream"])
        if self._serving_share > 1.0:
            raise ValueError(
                f"option 'serving_share' of policy 'separate' must be at most 1, got {self._serving_share}"
            )
        self._in_turn = InTurn()

    def roles(self, node_ids: Sequence[str]) -> dict[str, NodeRole]:
        """Static split."""
        # The small addend undoes rounding: a share of 0.29 of 100 nodes is 29.
        return split(node_ids, int(len(node_ids) * self._serving_share + 1e-9))

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
        del now_s, live, may_hold
        if self._one_stream and any(node.num_entering_training for node in cluster.training):
            return TrainingPlacement(None)
        return self._in_turn.microbatch(candidates)


def split(node_ids: Sequence[str], num_serving: int) -> dict[str, NodeRole]:
    """The first nodes serve, the others train, at least one each; a single node does both."""
    if len(node_ids) == 1:
        return {node_ids[0]: NodeRole.BOTH}
    num_serving = max(1, min(num_serving, len(node_ids) - 1))
    return {
        node_id: NodeRole.SERVE if index < num_serving else NodeRole.TRAIN for index, node_id in enumerate(node_ids)
    }
