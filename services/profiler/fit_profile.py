"""From the measurements of a profile to everything that is predicted with it. Pure."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from lemix.internal.v1 import profile_pb2
from services.latency import MOVES, Interference, LatencyModel, MixedCost, OpKind
from services.profile_messages import KIND_OF_PROTO
from services.profiler.convert import fit_to_proto, host_link_to_proto, interference_to_proto, mixed_to_proto
from services.profiler.fit import Fit, FitError, Timing, check_durations, fit_all
from services.profiler.fit_together import (
    BusyTiming,
    MixedTiming,
    MoveTiming,
    fit_host_link,
    fit_interference,
    fit_mixed,
)
from services.profiler.outliers import without_outliers

_T = TypeVar("_T")


class _Point(NamedTuple):
    """A measurement. `size` tells points of one operation apart."""

    stage: int
    op: OpKind
    busy: OpKind | None
    size: tuple[int, ...]
    message: profile_pb2.Measurement

    @property
    def durations_s(self) -> tuple[float, ...]:
        return tuple(self.message.durations_s)


def fit_profile(profile: profile_pb2.Profile) -> None:
    """Drops outliers from `profile.measurements` (and counts them) and fills in what follows from the rest.

    That is: fits, interference, host links and mixed costs, the last two for all stages or none; of those that were not
    measured, what is there stays. Raises FitError naming stage, operation and point for timings that are no positive
    numbers, and when an operation has too few points; of a profile with an `incomplete_reason` such an operation is
    left out.
    """
    points = [_point(item, profile.num_stages) for item in profile.measurements]
    _drop_outliers(points)
    fits = _fit_alone(points, skip_too_few=bool(profile.incomplete_reason))
    profile.ClearField("fits")
    profile.fits.extend(map(fit_to_proto, fits))
    stages = range(profile.num_stages)
    slowdowns = [item for stage in stages for item in _interference(points, stage)]
    if slowdowns:
        profile.ClearField("interference")
        profile.interference.extend(map(interference_to_proto, slowdowns))
    links = _of_all([fit_host_link(_moves(points, stage)) for stage in stages])
    if links:
        profile.ClearField("host_links")
        profile.host_links.extend(host_link_to_proto(stage, link) for stage, link in enumerate(links))
    models = {(fit.stage, fit.op): fit.model for fit in fits if fit.chosen}
    mixed = _of_all([_mixed(points, stage, models) for stage in stages])
    if mixed:
        profile.ClearField("mixed")
        profile.mixed.extend(mixed_to_proto(stage, cost) for stage, cost in enumerate(mixed))


def _point(item: profile_pb2.Measurement, num_stages: int) -> _Point:
    if item.op not in KIND_OF_PROTO or (item.busy and item.busy not in KIND_OF_PROTO):
        raise FitError(f"stage {item.stage}: unknown operation {item.busy if item.op in KIND_OF_PROTO else item.op}")
    op, busy = KIND_OF_PROTO[item.op], KIND_OF_PROTO.get(item.busy)
    where = f"stage {item.stage}, {op.value}"
    if item.stage >= num_stages:
        raise FitError(f"{where}: the profile has {num_stages} stages")
    what = f"batch {item.batch}, length {item.length}"
    if op in MOVES:
        what = f"{item.num_bytes} bytes"
        if not item.num_bytes:
            raise FitError(f"{where}: a move of nothing was timed")
    what += f" behind {item.cached_tokens} tokens" if item.cached_tokens else ""
    what += f" with {item.decodes} decodes" if item.decodes else ""
    what += f" beside {busy.value}" if busy else ""
    check_durations(item.durations_s, where, what)
    size = (item.batch, item.length, item.cached_tokens, item.decodes, item.decode_length, item.num_bytes)
    return _Point(item.stage, op, busy, size, item)


def _drop_outliers(points: Sequence[_Point]) -> None:
    """Spreads are compared among points of one operation under one condition."""
    groups: dict[tuple[int, OpKind, OpKind | None], list[_Point]] = defaultdict(list)
    for point in points:
        groups[point.stage, point.op, point.busy].append(point)
    for group in groups.values():
        for point, kept in zip(group, without_outliers([point.durations_s for point in group]), strict=True):
            point.message.outliers += len(point.durations_s) - len(kept)
            point.message.durations_s[:] = kept


def _fit_alone(points: Sequence[_Point], *, skip_too_few: bool) -> list[Fit]:
    timings: dict[tuple[int, OpKind], list[Timing]] = defaultdict(list)
    for point in points:
        if point.op in MOVES or point.busy or point.message.decodes:
            continue
        batch, length, cached = point.size[:3]
        timings[point.stage, point.op].append(Timing(batch, length, point.durations_s, cached))
    return fit_all(timings, skip_too_few=skip_too_few)


def _interference(points: Sequence[_Point], stage: int) -> list[Interference]:
    here = [point for point in points if point.stage == stage]
    alone = {(p.op, p.size): statistics.median(p.durations_s) for p in here if p.busy is None}
    busy = [BusyTiming(p.op, p.busy, p.size, p.durations_s) for p in here if p.busy is not None]
    return fit_interference(stage, busy, alone)


def _moves(points: Sequence[_Point], stage: int) -> list[MoveTiming]:
    moves = [point for point in points if point.stage == stage and point.op in MOVES and not point.busy]
    return [MoveTiming(point.op, point.message.num_bytes, point.durations_s) for point in moves]


def _mixed(points: Sequence[_Point], stage: int, models: Mapping[tuple[int, OpKind], LatencyModel]) -> MixedCost | None:
    prefill, decode = models.get((stage, OpKind.PREFILL)), models.get((stage, OpKind.DECODE))
    known = [point for point in points if point.stage == stage and point.message.decodes and not point.busy]
    if prefill is None or decode is None or not known:
        return None
    timings = []
    for point in known:
        batch, length, cached, decodes, decode_length, _ = point.size
        timings.append(MixedTiming(batch, length, cached, decodes, decode_length, point.durations_s))
    return fit_mixed(timings, prefill, decode)


def _of_all(values: Sequence[_T | None]) -> list[_T]:
    """What every stage has; nothing unless all have it."""
    found = [value for value in values if value is not None]
    return found if len(found) == len(values) else []
