"""The ablation "per_node: false": one set of coefficients for nodes of all speeds, the mean of what each one has."""

from collections.abc import Sequence
from typing import Self

from services.latency import NodeLatency, OpKind
from services.scheduler.core.costs import NodeCosts, OpRecord
from services.scheduler.core.policies.mean_latency import mean_latency


class MeanCosts(NodeCosts):
    """Predicts every node of a group by the mean of their coefficients, as profiled at first and as learnt later.

    Every node learns by itself. One learner for all of them would take the changes between fast and slow nodes for a
    device that changes, and follow whichever ran last: then it is no mean, but predicts the busiest node best.
    """

    __slots__ = ("_group", "_mean", "_own", "_own_latency")

    def __init__(self, own: NodeLatency, mean: NodeLatency) -> None:
        super().__init__(mean)
        self._mean = mean
        self._own_latency = own
        self._own = NodeCosts(own)
        self._group: Sequence[Self] = ()

    @classmethod
    def of_nodes(cls, latencies: Sequence[NodeLatency]) -> list[Self]:
        """One for every node; all of them predict the same."""
        mean = mean_latency(latencies)
        group = [cls(latency, mean) for latency in latencies]
        first = group[0]
        for costs in group:
            costs._terms, costs._sums, costs._jobs = first._terms, first._sums, first._jobs
            costs._group = [other for other in group if other.num_stages == other._own.num_stages]
        return group

    def calibrate(
        self,
        stage: int,
        op: OpKind,
        batch: float,
        length: float,
        actual_s: float,
        cached: float = 0.0,
        *,
        beside: bool = False,
    ) -> None:
        """Learn from a real duration of this node."""
        self._own.calibrate(stage, op, batch, length, actual_s, cached, beside=beside)
        model = self._mean.models[stage].get(op)
        if model is None:
            return
        rows = [other._own._terms[op][stage] for other in self._group if other._has(stage, op, model.form)]
        a, b, c, d = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        self._terms[op][stage] = (a, b, c, d)
        self._sums[op] = None

    def records(self) -> list[OpRecord]:
        """What was learnt of this node; errors are those of its own coefficients."""
        return self._own.records()

    def _has(self, stage: int, op: OpKind, form: str) -> bool:
        """Whether its own coefficients are part of the mean."""
        model = self._own_latency.models[stage].get(op)
        return model is not None and model.form == form
