"""Gives waiting work to nodes, where the policy decides and the bounds allow, and says why the rest waits."""

import math

from services.scheduler.core import policies, traces
from services.scheduler.core.admission import deadline_s, refuse_stale
from services.scheduler.core.commands import Assign, Command, Defer
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.policies.base import Placement, turn_terms
from services.scheduler.core.state import Cluster, LiveInference, LiveTask, LiveTraining, NodeState

#: Reasons of a Defer.
NO_NODE = "no_node"
INFLIGHT_LIMIT = "inflight_limit"
HELD_BACK = "held_back"

#: Shortest time to the next retry of held-back training, so that a policy cannot make the driver spin.
_MIN_RETRY_S = 0.01


class Assigner:
    """Appends Assign, Defer and Reject to `commands`, which the core renews for every step."""

    def __init__(self, config: CoreConfig, policy: policies.Policy, cluster: Cluster) -> None:
        self._config = config
        self._policy = policy
        self._cluster = cluster
        self.commands: list[Command] = []
        #: Requests that began to wait in this step: the driver is told why if they still wait at its end.
        self.new_waiting: list[LiveInference] = []
        #: When held-back training is looked at again; infinite when none is.
        self.retry_s = math.inf

    def assign(self, now_s: float) -> None:
        """Give away what nodes may take."""
        if self._cluster.waiting_inference:
            self._place_inference(now_s)
        self._release_training(now_s)

    def give(self, now_s: float, live: LiveTask, node: NodeState, cached_tokens: int = 0) -> None:
        """Book a waiting task on a node."""
        cluster = self._cluster
        if node.forecast is not None:
            traces.commit(now_s, live.task, node, node.forecast, cluster)
        if isinstance(live, LiveInference):
            del cluster.waiting_inference[live.task.task_id]
            node.add_inference(now_s, live, cached_tokens)
            cluster.sessions.assigned(live, node)
            node.lengths.observe(live.task.prompt_tokens)
        else:
            del cluster.waiting_training[live.task.task_id]
            node.add_training(live)
            node.lengths.observe(live.task.length)
        live.defer_reason = ""
        node.held.assigned(now_s)
        if node.mirror is not None:
            node.mirror.given(now_s, live)

    def _defer(self, live: LiveTask, reason: str) -> None:
        if live.defer_reason != reason:
            live.defer_reason = reason
            self.commands.append(Defer(live.task.task_id, reason))

    # ----------------------------------------------------------------- requests

    def _place_inference(self, now_s: float) -> None:
        cluster = self._cluster
        free = [node for node in cluster.serving if node.has_room]
        for live in list(cluster.waiting_inference.values()) if free else ():
            candidates = self._candidates(now_s, live, free)
            if not candidates:
                continue
            node = self._place_request(now_s, live, candidates)
            if not node.has_room:
                free.remove(node)
                if not free:
                    break
        for live in self.new_waiting:
            if live.task.task_id in cluster.waiting_inference:
                self._defer(live, INFLIGHT_LIMIT if cluster.serving else NO_NODE)
        self.new_waiting.clear()

    def _candidates(self, now_s: float, live: LiveInference, free: list[NodeState]) -> list[NodeState]:
        """Free nodes that may serve a request. It is rejected when no node's weights are new enough."""
        task = live.task
        candidates = [node for node in free if node.can_run(task)]
        if task.max_staleness_s is None:
            return candidates
        refusal = refuse_stale(now_s, task, self._cluster.serving)
        if refusal is not None:
            self._cluster.forget(live)
            self.commands.append(refusal)
            return []
        return [node for node in candidates if node.is_fresh(now_s, task.max_staleness_s)]

    def _place_request(self, now_s: float, live: LiveInference, candidates: list[NodeState]) -> NodeState:
        placement = self._with_first_choice(live, candidates)
        if placement is None:
            placement = self._policy.place_inference(now_s, live, candidates, self._cluster)
        node = placement.node
        live.queue_ttft_s = queue_ttft_s = placement.queue_ttft_s
        live.is_demoted = placement.is_demoted
        live.deadline_s = deadline_s(live.task, self._config, queue_ttft_s)
        self.give(now_s, live, node, placement.cached_tokens)
        command = Assign(live.task.task_id, node.spec.node_id, placement.terms, queue_ttft_s=queue_ttft_s)
        self.commands.append(command)
        return node

    def _with_first_choice(self, live: LiveInference, candidates: list[NodeState]) -> Placement | None:
        """A further choice goes where the first one is, which computes their prompt for both, in the same place of the
        queue; None when that is not there or has no room."""
        first = self._cluster.tasks.get(live.task.choice_of) if live.task.choice_of else None
        if not isinstance(first, LiveInference) or first.node not in candidates:
            return None
        terms = turn_terms(first.node, candidates)
        return Placement(first.node, terms, 0, first.queue_ttft_s, first.is_demoted)

    # ----------------------------------------------------------------- micro-batches

    def _release_training(self, now_s: float) -> None:
        """The next micro-batch of a node's stream leaves when the node takes it (`NodeState.takes_training`)."""
        cluster = self._cluster
        self.retry_s = math.inf
        bound = self._config.max_inflight_training
        while cluster.waiting_training:
            live = next(iter(cluster.waiting_training.values()))
            candidates = [node for node in cluster.training if node.takes_training(live.task, bound)]
            if not candidates:
                self._defer(live, INFLIGHT_LIMIT if cluster.training else NO_NODE)
                return
            if not self._release_one(now_s, live, candidates):
                self._defer(live, HELD_BACK)
                return
        for node in cluster.training:
            node.held_back_since_s = None

    def _release_one(self, now_s: float, live: LiveTraining, candidates: list[NodeState]) -> bool:
        """Give the next micro-batch away, unless it is held back on every candidate."""
        max_hold_s = self._config.max_hold_back_s
        overdue = [
            node
            for node in candidates
            if node.held_back_since_s is not None and now_s >= node.held_back_since_s + max_hold_s
        ]
        placement = self._policy.place_training(
            now_s, live, overdue or candidates, self._cluster, may_hold=not overdue and max_hold_s > 0.0
        )
        held = placement.held_back or self._starved(placement, candidates)
        for node in () if overdue else candidates:
            if node not in held:
                node.held_back_since_s = None
        for node in held:
            if node.held_back_since_s is None:
                node.held_back_since_s = now_s
            expiry_s = node.held_back_since_s + max_hold_s
            retry_s = min(max(placement.retry_s, now_s + _MIN_RETRY_S), expiry_s)
            self.retry_s = min(self.retry_s, retry_s)
        chosen = placement.node
        if chosen is None and overdue:
            chosen = overdue[0]  # the starvation bound holds whatever the policy says
        if chosen is None:
            return False
        chosen.held_back_since_s = None
        live.parts = placement.parts
        self.give(now_s, live, chosen)
        self.commands.append(Assign(live.task.task_id, chosen.spec.node_id, placement.terms, placement.parts))
        return True

    def _starved(self, placement: policies.TrainingPlacement, candidates: list[NodeState]) -> list[NodeState]:
        """Nodes for which the clock runs although the policy held back on none by name: all of them when no training
        is under way anywhere. While some is, the policy may wait for its end."""
        is_idle = placement.node is None and not any(node.training for node in self._cluster.training)
        return candidates if is_idle else []
