"""Protobuf to fitting types and back."""

from lemix.internal.v1 import profile_pb2
from services.latency import HostLink, Interference, MixedCost
from services.profile_messages import KIND_OF_PROTO
from services.profiler.fit import Fit

PROTO_OF_KIND = {kind: number for number, kind in KIND_OF_PROTO.items()}


def fit_to_proto(fit: Fit) -> profile_pb2.LatencyFit:
    """The stored form of a fit."""
    stored = profile_pb2.LatencyFit(
        stage=fit.stage,
        op=PROTO_OF_KIND[fit.op],
        model=fit.form,
        coefficients=fit.coefficients,
        mape=fit.mape,
        r2=fit.r2,
        chosen=fit.chosen,
        residual_p5=fit.residual_p5,
        residual_p95=fit.residual_p95,
    )
    if fit.table is not None:
        stored.table.batches.extend(fit.table.batches)
        stored.table.lengths.extend(fit.table.lengths)
        stored.table.durations_s.extend(fit.table.durations_s)
    return stored


def interference_to_proto(item: Interference) -> profile_pb2.Interference:
    """The stored form of a slowdown."""
    return profile_pb2.Interference(
        stage=item.stage,
        op=PROTO_OF_KIND[item.op],
        busy=PROTO_OF_KIND[item.busy],
        slowdown=item.slowdown,
        std=item.std,
    )


def host_link_to_proto(stage: int, link: HostLink) -> profile_pb2.HostLink:
    """The stored form of a host link."""
    return profile_pb2.HostLink(
        stage=stage,
        offload_bytes_per_s=link.offload_bytes_per_s,
        reload_bytes_per_s=link.reload_bytes_per_s,
        fixed_s=link.fixed_s,
    )


def mixed_to_proto(stage: int, cost: MixedCost) -> profile_pb2.MixedCost:
    """The stored form of what mixed operations cost."""
    return profile_pb2.MixedCost(
        stage=stage,
        prefill=cost.prefill,
        decode=cost.decode,
        shared=cost.shared,
        mape=cost.mape,
        residual_p5=cost.residual_p5,
        residual_p95=cost.residual_p95,
    )
