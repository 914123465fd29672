"""The ablation "per_node: false": one set of coefficients for nodes of all speeds."""

from collections.abc import Sequence

from services.latency import LatencyModel, LatencyTable, MixedCost, NodeLatency, OpKind


def mean_latency(latencies: Sequence[NodeLatency]) -> NodeLatency:
    """What operations take on average over nodes with as many stages as the first one.

    Coefficients, or durations of tables over the same grid, are averaged; of an operation that not all nodes describe
    in the same form, the first one's are taken. What a prefill and a decode cost together is averaged where all nodes
    were measured for it; what an operation costs alone is all that is left otherwise.
    """
    first = latencies[0]
    alike = [latency for latency in latencies if latency.num_stages == first.num_stages]
    stages = range(first.num_stages)
    models = tuple({op: _mean(op, stage, alike) for op in first.models[stage]} for stage in stages)
    is_mixed = all(latency.mixed for latency in alike)
    return NodeLatency(models, mixed=tuple(_mean_mixed(stage, alike) for stage in stages) if is_mixed else ())


def _mean_mixed(stage: int, latencies: Sequence[NodeLatency]) -> MixedCost:
    rows = [(mixed.prefill, mixed.decode, mixed.shared) for mixed in (latency.mixed[stage] for latency in latencies)]
    return MixedCost(*_means(rows))


def _mean(op: OpKind, stage: int, latencies: Sequence[NodeLatency]) -> LatencyModel:
    models = [latency.models[stage].get(op) for latency in latencies]
    first = latencies[0].models[stage][op]
    known = [model for model in models if model is not None and model.form == first.form]
    if len(known) < len(models):
        return first
    tables = [model.table for model in known if model.table is not None]
    if not tables:
        return LatencyModel(first.form, _means([model.coefficients for model in known]))
    if len({(table.batches, table.lengths) for table in tables}) > 1:
        return first
    durations_s = _means([table.durations_s for table in tables])
    return LatencyModel(first.form, (), table=LatencyTable(tables[0].batches, tables[0].lengths, durations_s))


def _means(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))
