"""Profiles as the profiler sends and stores them, read into latency models."""

from lemix.internal.v1 import profile_pb2
from services.latency import HostLink, Interference, LatencyModel, LatencyTable, MixedCost, NodeLatency, OpKind

KIND_OF_PROTO = {
    profile_pb2.OP_KIND_PREFILL: OpKind.PREFILL,
    profile_pb2.OP_KIND_DECODE: OpKind.DECODE,
    profile_pb2.OP_KIND_TRAIN_FORWARD: OpKind.TRAIN_FORWARD,
    profile_pb2.OP_KIND_TRAIN_BACKWARD: OpKind.TRAIN_BACKWARD,
    profile_pb2.OP_KIND_OPTIMIZER_STEP: OpKind.OPTIMIZER_STEP,
    profile_pb2.OP_KIND_WEIGHT_SYNC: OpKind.WEIGHT_SYNC,
    profile_pb2.OP_KIND_OFFLOAD: OpKind.OFFLOAD,
    profile_pb2.OP_KIND_RELOAD: OpKind.RELOAD,
}


def latency_from_profile(profile: profile_pb2.Profile) -> NodeLatency:
    """The chosen fits of a profile. Raises ValueError when a stage has none or something makes no sense."""
    stages: list[dict[OpKind, LatencyModel]] = [{} for _ in range(profile.num_stages)]
    where = f"profile {profile.profile_id}"
    for fit in profile.fits:
        if not fit.chosen or fit.op not in KIND_OF_PROTO:
            continue
        if fit.stage >= len(stages):
            raise ValueError(f"{where} has {len(stages)} stages and a fit for stage {fit.stage}")
        stages[fit.stage][KIND_OF_PROTO[fit.op]] = model_from_fit(fit)
    for stage, models in enumerate(stages):
        if OpKind.PREFILL not in models:
            raise ValueError(f"{where} has no chosen fit for prefill on stage {stage}")
    if not stages:
        raise ValueError(f"{where} has no stages")
    try:
        return NodeLatency(tuple(stages), _interference(profile), _host_links(profile), _mixed(profile))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def model_from_fit(fit: profile_pb2.LatencyFit) -> LatencyModel:
    """What predicts with a stored fit. Raises ValueError for one that makes no sense."""
    table = None
    if fit.HasField("table"):
        durations_s = tuple(fit.table.durations_s)
        table = LatencyTable(tuple(fit.table.batches), tuple(fit.table.lengths), durations_s)
    return LatencyModel(fit.model, tuple(fit.coefficients), fit.mape, fit.residual_p5, fit.residual_p95, table)


def _interference(profile: profile_pb2.Profile) -> tuple[Interference, ...]:
    known = [item for item in profile.interference if item.op in KIND_OF_PROTO and item.busy in KIND_OF_PROTO]
    return tuple(
        Interference(item.stage, KIND_OF_PROTO[item.op], KIND_OF_PROTO[item.busy], item.slowdown, item.std)
        for item in known
    )


def _host_links(profile: profile_pb2.Profile) -> tuple[HostLink, ...]:
    links = sorted(profile.host_links, key=lambda link: link.stage)
    return tuple(HostLink(link.offload_bytes_per_s, link.reload_bytes_per_s, link.fixed_s) for link in links)


def _mixed(profile: profile_pb2.Profile) -> tuple[MixedCost, ...]:
    costs = sorted(profile.mixed, key=lambda cost: cost.stage)
    return tuple(
        MixedCost(cost.prefill, cost.decode, cost.shared, cost.mape, cost.residual_p5, cost.residual_p95)
        for cost in costs
    )
