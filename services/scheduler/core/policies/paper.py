"""The paper's score (Eq. 3) on the corrected forecast, in two forms, and its hold-back (Eq. 4).

IP, LC and R are terms of a candidate: idleness profit, length consistency, response time (docs/scheduler.md).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from services.latency import OpKind
from services.scheduler.core.commands import NodeTerms, SyncMode
from services.scheduler.core.events import Event, NodeJoined
from services.scheduler.core.forecast import NodeForecast
from services.scheduler.core.node_spec import NodeRole, QueueOrder
from services.scheduler.core.policies.base import (
    Options,
    Placement,
    TrainingPlacement,
    check_options,
    every_node,
    forecast_of,
)
from services.scheduler.core.policies.no_profile import no_profile
from services.scheduler.core.state import Cluster, LiveInference, LiveTraining, NodeState
from services.scheduler.core.traces import forward_s_per_stage, training_s_per_stage

#: Training is held back when its own predicted response exceeds this many SLO units.
HOLD_BACK_UNITS = 5.0
#: A node without a profile predicts no time at all; a quotient needs some.
_SHORTEST_S = 1e-9

_OPTIONS = {"lambda_1": 0.15, "lambda_2": 0.05, "tau_s": 0.2, "hold_back": True, "profile": True}


class Asked(NamedTuple):
    """What a candidate is asked about: the task's release, length in tokens, and batch in sequences."""

    now_s: float
    release_s: float
    length: int
    batch: int


class PaperPolicy(ABC):
    """Base: every node does both; the highest score wins, of equals the lowest id. First come first served.

    lambda_1: weight of the response time. lambda_2: weight of the length consistency. tau_s: idleness that costs
    nothing (II / S - gap below it). The paper's ablations: hold_back false never holds training back; profile false
    takes every task to last the same time (no_profile.py).
    """

    queue_order = QueueOrder.FIFO
    sync_mode = SyncMode.AVERAGE
    uses_forecast = True
    fastest_first = False

    def __init__(self, name: str, options: Options) -> None:
        values = check_options(name, options, _OPTIONS)
        self._lambda_1 = values["lambda_1"]
        self._lambda_2 = values["lambda_2"]
        self._tau_s = values["tau_s"]
        self._hold_back = bool(values["hold_back"])
        self._profile = bool(values["profile"])

    def roles(self, node_ids: Sequence[str]) -> dict[str, NodeRole]:
        """Every node does both."""
        return every_node(NodeRole.BOTH, node_ids)

    def observe(self, now_s: float, event: Event, cluster: Cluster) -> bool:
        """Take the profile of a new node away, for the ablation."""
        del now_s
        if isinstance(event, NodeJoined) and not self._profile:
            cluster.nodes[event.node.node_id].costs = no_profile(event.node.num_stages)
        return False

    def place_inference(
        self, now_s: float, live: LiveInference, candidates: Sequence[NodeState], cluster: Cluster
    ) -> Placement:
        """The node with the highest score."""
        task = live.task
        asked = Asked(now_s, task.arrival_s, task.prompt_tokens, 1)
        terms = tuple([self._terms(asked, node, forward_s_per_stage(task, node, cluster)) for node in candidates])
        return Placement(candidates[_best(terms)], terms)

    def place_training(
        self, now_s: float, live: LiveTraining, candidates: Sequence[NodeState], cluster: Cluster, *, may_hold: bool
    ) -> TrainingPlacement:
        """The node with the highest score, unless the micro-batch would respond too late even there (Eq. 4)."""
        task = live.task
        # The A-PP rule releases it now; how long its job's backlog has waited says nothing about the nodes.
        asked = Asked(now_s, now_s, task.length, task.batch)
        terms = tuple(
            [self._terms(asked, node, training_s_per_stage(task, node, OpKind.TRAIN_FORWARD)) for node in candidates]
        )
        best = _best(terms)
        limit_s = HOLD_BACK_UNITS * cluster.slo_unit_s
        response_s = terms[best].response_s
        holds = self._hold_back and may_hold
        if holds and 0.0 < limit_s < response_s and _inference_arrives(now_s, limit_s, cluster):
            return TrainingPlacement(None, held_back=candidates, retry_s=now_s + response_s - limit_s)
        return TrainingPlacement(candidates[best], terms)

    def _terms(self, asked: Asked, node: NodeState, forward_s: Sequence[float]) -> NodeTerms:
        forecast = forecast_of(node)
        idleness_s, end_s = self._compute_idleness(asked, node, forecast, forward_s)
        profit_s = -max(idleness_s / len(forward_s) - forecast.gap_s(asked.now_s), self._tau_s)
        response_s = end_s - asked.release_s
        consistency = self._consistency(node, asked.length)
        score = self._score(profit_s, consistency, response_s)
        return NodeTerms(node.spec.node_id, idleness_s, response_s, profit_s, consistency, score)

    def _compute_idleness(
        self, asked: Asked, node: NodeState, forecast: NodeForecast, forward_s: Sequence[float]
    ) -> tuple[float, float]:
        """II and the forward end on the last stage."""
        del node
        path = forecast.compute_idleness(asked.now_s, forward_s)
        return path.idleness_s, path.end_s

    def _consistency(self, node: NodeState, length: int) -> float:
        return node.lengths.consistency(length)

    @abstractmethod
    def _score(self, profit_s: float, consistency: float, response_s: float) -> float:
        """The form of Eq. 3."""


class PaperAdditive(PaperPolicy):
    """score = IP + lambda_2 * LC - lambda_1 * R: keeps the meaning that the paper gives to the three terms."""

    def __init__(self, options: Options) -> None:
        super().__init__("paper_additive", options)

    def _score(self, profit_s: float, consistency: float, response_s: float) -> float:
        return profit_s + self._lambda_2 * consistency - self._lambda_1 * response_s


class PaperRatio(PaperPolicy):
    """score = (IP + lambda_2 * LC) / (lambda_1 * R), as in the released code.

    IP is negative, so of two nodes with the same IP the slower one scores higher: this form packs one node. lambda_1
    scales every score alike and changes no choice.
    """

    def __init__(self, options: Options, name: str = "paper_ratio") -> None:
        super().__init__(name, options)
        if self._lambda_1 <= 0.0:
            raise ValueError(f"option 'lambda_1' of policy {name!r} must be a number > 0, got 0")

    def _score(self, profit_s: float, consistency: float, response_s: float) -> float:
        return (profit_s + self._lambda_2 * consistency) / max(response_s, _SHORTEST_S) / self._lambda_1


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
