"""What two profiles predict differently: pure."""

import statistics
from collections.abc import Iterable

from lemix.internal.v1 import profile_pb2
from lemix.internal.v1 import profiler_service_pb2 as profiler_pb2
from services.latency import NodeLatency, OpKind
from services.profile_messages import KIND_OF_PROTO, latency_from_profile

_COMPARED = ("model", "num_stages", "engine", "device", "dtype", "threads_per_stage", "source", "incomplete_reason")

_Place = tuple[int, profile_pb2.OpKind]
_Point = tuple[int, int, int]


def compare(base: profile_pb2.Profile, other: profile_pb2.Profile) -> profiler_pb2.DiffProfilesResponse:
    """By stage and operation, the predictions of `other` over those of `base` at the points that either measured.

    Raises ValueError for a profile that predicts nothing.
    """
    predictions = latency_from_profile(base), latency_from_profile(other)
    fits = _chosen(base), _chosen(other)
    points = _points([*base.measurements, *other.measurements])
    ops = []
    for place in sorted(fits[0].keys() | fits[1].keys()):
        difference = profiler_pb2.OpDifference(stage=place[0], op=place[1])
        for side, known in zip((difference.base, difference.other), fits, strict=True):
            if place in known:
                side.CopyFrom(known[place])
        if place in fits[0] and place in fits[1]:
            _compare_predictions(difference, predictions, points.get(place, {(1, 1, 0): None}))
        ops.append(difference)
    return profiler_pb2.DiffProfilesResponse(ops=ops, notes=_notes(base, other))


def _chosen(profile: profile_pb2.Profile) -> dict[_Place, profile_pb2.LatencyFit]:
    return {(fit.stage, fit.op): fit for fit in profile.fits if fit.chosen and fit.op in KIND_OF_PROTO}


def _points(measurements: Iterable[profile_pb2.Measurement]) -> dict[_Place, dict[_Point, None]]:
    """Points of operations alone, by stage and operation."""
    points: dict[_Place, dict[_Point, None]] = {}
    for item in measurements:
        if not item.busy and not item.decodes:
            points.setdefault((item.stage, item.op), {})[item.batch, item.length, item.cached_tokens] = None
    return points


def _compare_predictions(
    difference: profiler_pb2.OpDifference, predictions: tuple[NodeLatency, NodeLatency], points: Iterable[_Point]
) -> None:
    stage, op = difference.stage, OpKind(KIND_OF_PROTO[difference.op])
    ratios = []
    for batch, length, cached in points:
        base_s, other_s = (latency.op_s(stage, op, batch, length, cached) for latency in predictions)
        if base_s > 0.0:
            ratios.append(other_s / base_s)
    if ratios:
        difference.points = len(ratios)
        difference.ratio_min, difference.ratio_max = min(ratios), max(ratios)
        difference.ratio_p50 = statistics.median(ratios)


def _notes(base: profile_pb2.Profile, other: profile_pb2.Profile) -> list[str]:
    return [
        f"{name}: {getattr(base, name)!r} and {getattr(other, name)!r}"
        for name in _COMPARED
        if getattr(base, name) != getattr(other, name)
    ]
