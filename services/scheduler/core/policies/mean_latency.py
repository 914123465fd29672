"""The ablation "per_node: false": one set of coefficients for nodes of all speeds."""

from collections.abc import Sequence

from services.latency import LatencyModel, NodeLatency, OpKind


def mean_latency(latencies: Sequence[NodeLatency]) -> NodeLatency:
    """What operations take on average over nodes with as many stages as the first one.

    Coefficients are averaged; of an operation that not all nodes describe in the same form, the first one's are taken.
    """
    first = latencies[0]
    alike = [latency for latency in latencies if latency.num_stages == first.num_stages]
    stages = range(first.num_stages)
    return NodeLatency(tuple({op: _mean(op, stage, alike) for op in first.models[stage]} for stage in stages))


def _mean(op: OpKind, stage: int, latencies: Sequence[NodeLatency]) -> LatencyModel:
    models = [latency.models[stage].get(op) for latency in latencies]
    first = latencies[0].models[stage][op]
    known = [model for model in models if model is not None and model.form == first.form and model.table is None]
    if len(known) < len(models):
        return first
    columns = zip(*(model.coefficients for model in known), strict=True)
    return LatencyModel(first.form, tuple(sum(column) / len(known) for column in columns))
