"""What the mixing baselines share: every node serves and trains, first come first served, nothing is held back."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from services.scheduler.core.commands import NodeTerms, SyncMode
from services.scheduler.core.node_spec import NodeRole, QueueOrder
from services.scheduler.core.policies.base import Options, Placement, TrainingPlacement, check_options, every_node
from services.scheduler.core.state import Cluster, LiveInference, LiveTask, LiveTraining, NodeState

#: The `+` variants of the paper: use only the first so many nodes by id, as many as LeMix used; 0: all.
MAX_NODES = {"max_nodes": 0}


class Mixed:
    """Base: roles of a mixing baseline. `max_nodes` nodes by id get work, the others none."""

    queue_order = QueueOrder.FIFO
    sync_mode = SyncMode.AVERAGE
    uses_forecast = False
    fastest_first = False

    def __init__(self, name: str, options: Options, known: dict[str, float] | None = None) -> None:
        self._options = check_options(name, options, {**MAX_NODES, **(known or {})})
        self._max_nodes = int(self._options["max_nodes"])

    def roles(self, node_ids: Sequence[str]) -> dict[str, NodeRole]:
        """The first `max_nodes` do both."""
        return every_node(NodeRole.BOTH, node_ids[: self._max_nodes or None])


class Ranked(Mixed, ABC):
    """Base: the node with the smallest cost gets the task, request or micro-batch; of equals the lowest id."""

    def place_inference(
        self, now_s: float, live: LiveInference, candidates: Sequence[NodeState], cluster: Cluster
    ) -> Placement:
        """The cheapest node."""
        return Placement(*self._cheapest(now_s, live, candidates, cluster))

    def place_training(
        self, now_s: float, live: LiveTraining, candidates: Sequence[NodeState], cluster: Cluster, *, may_hold: bool
    ) -> TrainingPlacement:
        """The cheapest node."""
        del may_hold
        return TrainingPlacement(*self._cheapest(now_s, live, candidates, cluster))

    def _cheapest(
        self, now_s: float, live: LiveTask, candidates: Sequence[NodeState], cluster: Cluster
    ) -> tuple[NodeState, tuple[NodeTerms, ...]]:
        costs = [self._cost(now_s, live, node, cluster) for node in candidates]
        chosen = candidates[costs.index(min(costs))]
        terms = tuple(
            NodeTerms(node.spec.node_id, 0.0, 0.0, 0.0, 0.0, -cost)
            for node, cost in zip(candidates, costs, strict=True)
        )
        return chosen, terms

    @abstractmethod
    def _cost(self, now_s: float, live: LiveTask, node: NodeState, cluster: Cluster) -> float:
        """What the task costs on a node; smaller is better."""
