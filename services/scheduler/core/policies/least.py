"""Baselines that compare the nodes' load: fewest tasks, and least utilised (Mix-LUF of the paper)."""

from services.scheduler.core.events import Event, NodeJoined, NodeLost, OpFinished
from services.scheduler.core.policies.base import Options
from services.scheduler.core.policies.mixed import Ranked
from services.scheduler.core.policies.recent import Recent
from services.scheduler.core.state import Cluster, LiveTask, NodeState


class LeastLoaded(Ranked):
    """Fewest live tasks, requests and micro-batches alike."""

    def __init__(self, options: Options) -> None:
        super().__init__("least_loaded", options)

    def _cost(self, now_s: float, live: LiveTask, node: NodeState, cluster: Cluster) -> float:
        del now_s, live, cluster
        return float(len(node.inference) + len(node.training))


class LeastUtilised(Ranked):
    """Lowest busy share of the stages over the last `window_s`, from the operations that ended.

    Over a window and not since the node joined: a long past would hide what a node does now, and would send everything
    to a node that has just come. It still lags behind: tasks that come while an operation runs all see the same shares.
    (The released research code compares the memory in use, which a paged KV cache keeps constant.)
    """

    def __init__(self, options: Options) -> None:
        super().__init__("least_utilised", options, {"window_s": 10.0})
        self._window_s = self._options["window_s"]
        if self._window_s <= 0.0:
            raise ValueError("option 'window_s' of policy 'least_utilised' must be a number > 0, got 0")
        self._busy: dict[str, Recent] = {}

    def observe(self, now_s: float, event: Event, cluster: Cluster) -> bool:
        """Add up busy time."""
        match event:
            case OpFinished(node_id):
                busy = self._busy.get(node_id)
                if busy is not None:
                    busy.add(event.end_s, (event.end_s - event.begin_s) / cluster.nodes[node_id].costs.num_stages)
            case NodeJoined(spec):
                # A known one, with a new profile, keeps its past.
                self._busy.setdefault(spec.node_id, Recent(now_s, self._window_s))
            case NodeLost(node_id):
                self._busy.pop(node_id, None)
        return False

    def _cost(self, now_s: float, live: LiveTask, node: NodeState, cluster: Cluster) -> float:
        del live, cluster
        busy = self._busy.get(node.spec.node_id)
        return busy.per_s(now_s) if busy is not None else 0.0
