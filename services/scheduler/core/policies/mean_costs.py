"""The ablation "per_node: false": nodes of all speeds are predicted alike, by the mean of what each one would be."""

from collections.abc import Sequence

from services.latency import NodeLatency, OpKind
from services.scheduler.core.costs import NodeCosts


class MeanCosts(NodeCosts):
    """Predicts every node of a group by the mean of their predictions, as profiled at first and as learnt later.

    The mean is of durations, not of coefficients: the same for polynomials, and profiles may differ in form. Every node
    learns by itself. One learner for all of them would take the changes between fast and slow nodes for a device that
    changes, and follow whichever ran last: then it is no mean, but predicts the busiest node best.
    """

    __slots__ = ("_group",)

    def __init__(self, own: NodeLatency) -> None:
        super().__init__(own)
        #: Those with as many stages, this one included.
        self._group: Sequence[MeanCosts] = (self,)

    @classmethod
    def of_nodes(cls, latencies: Sequence[NodeLatency]) -> list["MeanCosts"]:
        """One for every node; those with as many stages predict the same."""
        all_costs = [cls(latency) for latency in latencies]
        for costs in all_costs:
            costs._group = [other for other in all_costs if other.num_stages == costs.num_stages]
            costs._jobs = costs._group[0]._jobs
        return all_costs

    def stage_s(
        self, stage: int, op: OpKind, batch: float, length: float, cached: float = 0.0, job_id: str = ""
    ) -> float:
        """See NodeCosts; nodes that have no model of the operation are no part of the mean."""
        found = [
            NodeCosts.stage_s(other, stage, op, batch, length, cached, job_id)
            for other in self._group
            if op in other._latency.models[stage]
        ]
        return sum(found) / len(found) if found else 0.0

    def node_s(self, op: OpKind, batch: float, length: float, cached: float = 0.0, job_id: str = "") -> float:
        """See NodeCosts."""
        return sum([self.stage_s(stage, op, batch, length, cached, job_id) for stage in range(self.num_stages)])

    def mixed_s(self, stage: int, prefill_s: float, decode_s: float) -> float:
        """See NodeCosts."""
        found = [NodeCosts.mixed_s(other, stage, prefill_s, decode_s) for other in self._group]
        return sum(found) / len(found)
