"""Protobuf to fitting types and back."""

from collections import defaultdict
from collections.abc import Iterable

from lemix.internal.v1 import profile_pb2
from services.latency import OpKind
from services.profiler.fit import Fit, Timing

_KINDS = {
    profile_pb2.OP_KIND_PREFILL: OpKind.PREFILL,
    profile_pb2.OP_KIND_DECODE: OpKind.DECODE,
    profile_pb2.OP_KIND_TRAIN_FORWARD: OpKind.TRAIN_FORWARD,
    profile_pb2.OP_KIND_TRAIN_BACKWARD: OpKind.TRAIN_BACKWARD,
    profile_pb2.OP_KIND_OPTIMIZER_STEP: OpKind.OPTIMIZER_STEP,
    profile_pb2.OP_KIND_WEIGHT_SYNC: OpKind.WEIGHT_SYNC,
}
_NUMBERS = {kind: number for number, kind in _KINDS.items()}


def timings_from_proto(measurements: Iterable[profile_pb2.Measurement]) -> dict[tuple[int, OpKind], list[Timing]]:
    """Timings by (stage, operation). Raises ValueError for an operation this version does not know."""
    timings: dict[tuple[int, OpKind], list[Timing]] = defaultdict(list)
    for item in measurements:
        if item.op not in _KINDS:
            raise ValueError(f"unknown operation {item.op}")
        timing = Timing(batch=item.batch, length=item.length, durations_s=tuple(item.durations_s))
        timings[item.stage, _KINDS[item.op]].append(timing)
    return dict(timings)


def fit_to_proto(fit: Fit) -> profile_pb2.LatencyFit:
    """The stored form of a fit."""
    stored = profile_pb2.LatencyFit(
        stage=fit.stage,
        op=_NUMBERS[fit.op],
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
