"""Separate clusters whose split follows the load."""

import math
from collections.abc import Sequence

from services.scheduler.core.commands import SyncMode
from services.scheduler.core.events import Event
from services.scheduler.core.node_spec import NodeRole, QueueOrder
from services.scheduler.core.policies.base import InTurn, Options, Placement, TrainingPlacement, check_options
from services.scheduler.core.policies.queue_work import work_s
from services.scheduler.core.policies.recent import Recent
from services.scheduler.core.policies.separate import split
from services.scheduler.core.state import Cluster, LiveInference, LiveTraining, NodeState


class SeparateDynamic:
    """As many nodes serve, the first by id, as the predicted work of recent requests fills up to `utilisation`.

    window_s: over which the work is averaged. dwell_s: the split is looked at, and so changes, no more often. It starts
    with half the nodes. A node whose role changed finishes what it holds.

    Only serving counts: training comes from a backlog as fast as its nodes take it, so its work says how many nodes it
    has, not how many it needs. A split by the shares of both settles where the serving nodes are busy all the time.
    """

    queue_order = QueueOrder.FIFO
    sync_mode = SyncMode.REPLACE
    uses_forecast = False
    fastest_first = False

    def __init__(self, options: Options) -> None:
        known = {"utilisation": 0.5, "window_s": 30.0, "dwell_s": 30.0}
        values = check_options("separate_dynamic", options, known)
        for name in ("utilisation", "window_s"):
            if values[name] <= 0.0:
                raise ValueError(f"option {name!r} of policy 'separate_dynamic' must be a number > 0, got 0")
        self._utilisation = values["utilisation"]
        self._window_s = values["window_s"]
        self._dwell_s = values["dwell_s"]
        self._in_turn = InTurn()
        self._work: Recent | None = None
        #: When the split is looked at next.
        self._next_s = -math.inf
        #: Nodes that should serve; None: half of them.
        self._num_serving: int | None = None

    def roles(self, node_ids: Sequence[str]) -> dict[str, NodeRole]:
        """The split in force."""
        return split(node_ids, len(node_ids) // 2 if self._num_serving is None else self._num_serving)

    def observe(self, now_s: float, event: Event, cluster: Cluster) -> bool:
        """Look at the split when it is time."""
        del event
        if now_s < self._next_s:
            return False
        self._next_s = now_s + self._dwell_s
        if self._work is None or len(cluster.nodes) < 2:
            return False
        needed = max(1, min(math.ceil(self._work.per_s(now_s) / self._utilisation), len(cluster.nodes) - 1))
        self._num_serving = needed
        return needed != len(cluster.serving)

    def place_inference(
        self, now_s: float, live: LiveInference, candidates: Sequence[NodeState], cluster: Cluster
    ) -> Placement:
        """The next serving node in turn."""
        placement = self._in_turn.request(candidates)
        if self._work is None:
            self._work = Recent(now_s, self._window_s)
            self._next_s = now_s + self._dwell_s
        self._work.add(now_s, work_s(live, placement.node, cluster))
        return placement

    def place_training(
        self, now_s: float, live: LiveTraining, candidates: Sequence[NodeState], cluster: Cluster, *, may_hold: bool
    ) -> TrainingPlacement:
        """The next training node in turn."""
        del now_s, live, cluster, may_hold
        return self._in_turn.microbatch(candidates)
