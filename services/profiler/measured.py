"""What a node has said of its points so far, and the profile that follows from it: pure but for the time given."""

import math
from collections.abc import Sequence

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import node_agent_service_pb2 as node_pb2
from lemix.internal.v1 import profile_pb2, work_pb2
from services.profiler.fit import FitError
from services.profiler.fit_profile import fit_profile
from services.profiler.memory import fit_memory
from services.profiler.statistics import distribution

_MOST_NAMED = 4
_Key = tuple[int, int, int, int, int, int, int, int, int]


class Measured:
    """Answers of MeasureOps for one node, the rounds of a point put together."""

    def __init__(self, info: node_pb2.GetNodeInfoResponse, points: Sequence[node_pb2.GridPoint]) -> None:
        self._info = info
        self._points = points
        self._merged: dict[_Key, profile_pb2.Measurement] = {}
        self._seen: set[int] = set()
        self._left_out: dict[int, str] = {}
        self._last: node_pb2.MeasureOpsResponse | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been timed."""
        return not self._merged

    def add(self, response: node_pb2.MeasureOpsResponse) -> None:
        """Take one message. Raises LemixError INTERNAL for a duration that is none, or a point nobody asked for."""
        if not response.HasField("point"):
            self._last = response
            return
        if response.point >= len(self._points):
            raise self._unusable(f"it timed point {response.point} of {len(self._points)}")
        if response.left_out_reason:
            self._left_out[response.point] = response.left_out_reason
            return
        for item in response.measurements:
            self._check(item)
        stages = {item.stage for item in response.measurements}
        if stages != set(range(self._info.num_stages)):
            name = profile_pb2.OpKind.Name(self._points[response.point].op)
            raise self._unusable(f"it did not time {name} on all its stages")
        self._seen.add(response.point)
        for item in response.measurements:
            key = _key(item)
            known = self._merged.get(key)
            if known is None:
                self._merged[key] = known = profile_pb2.Measurement()
                known.CopyFrom(item)
                continue
            known.durations_s.extend(item.durations_s)
            known.peak_bytes = max(known.peak_bytes, item.peak_bytes)

    def profile(
        self, samples: Sequence[work_pb2.TrainingExample], *, now_unix_s: float, ended_because: str = ""
    ) -> profile_pb2.Profile:
        """The profile, without version. ended_because: why the node did not get to its end.

        Raises LemixError INTERNAL when nothing can be fitted, or when the node ended without what belongs to its end.
        """
        info = self._info
        missing = self._missing(budget_was_spent=not ended_because)
        profile = profile_pb2.Profile(
            fingerprint=info.profile_fingerprint,
            node_id=info.node_id,
            created_unix_s=now_unix_s,
            num_stages=info.num_stages,
            model=info.model,
            engine=info.engine,
            device=info.device,
            dtype=info.dtype,
            threads_per_stage=info.threads_per_stage,
            source="measured",
            measurements=self._merged.values(),
            incomplete_reason="; ".join(filter(None, (ended_because, missing))),
        )
        if self._last is not None:
            profile.peak_memory_bytes.extend(self._last.peak_memory_bytes)
            profile.memory.extend(fit_memory(profile.measurements, self._last.memory))
        if samples and not ended_because:
            self._add_statistics(profile, samples)
        try:
            fit_profile(profile)
        except FitError as error:
            raise self._unusable(str(error)) from error
        if not profile.fits:
            raise self._unusable(f"no operation was timed at enough points to fit it; {profile.incomplete_reason}")
        return profile

    def _missing(self, *, budget_was_spent: bool) -> str:
        """What of the grid was not measured; empty when nothing is missing."""
        unseen = [index for index in range(len(self._points)) if index not in self._seen]
        if not unseen:
            return ""
        left_out = [self._left_out[index] for index in unseen if index in self._left_out]
        names = [_name(self._points[index]) for index in unseen[:_MOST_NAMED]]
        more = f" and {len(unseen) - _MOST_NAMED} more" if len(unseen) > _MOST_NAMED else ""
        reasons = "".join(f" ({reason})" for reason in left_out[:1])
        spent = "the budget was spent: " if budget_was_spent and len(unseen) > len(left_out) else ""
        return (
            f"{spent}{len(unseen)} of {len(self._points)} points were not measured: {', '.join(names)}{more}{reasons}"
        )

    def _add_statistics(self, profile: profile_pb2.Profile, samples: Sequence[work_pb2.TrainingExample]) -> None:
        losses = [] if self._last is None else list(self._last.sample_losses)
        if len(losses) != len(samples):
            raise self._unusable(f"it returned {len(losses)} losses for {len(samples)} samples")
        if not all(map(math.isfinite, losses)):
            raise self._unusable("the loss of a sample is not a number")
        profile.loss.CopyFrom(distribution(losses))
        profile.length.CopyFrom(distribution([len(sample.token_ids) for sample in samples]))

    def _check(self, item: profile_pb2.Measurement) -> None:
        where = f"stage {item.stage}, {profile_pb2.OpKind.Name(item.op)}, batch {item.batch}, length {item.length}"
        if item.op == profile_pb2.OP_KIND_UNSPECIFIED:
            raise self._unusable(f"{where}: it does not say which operation it timed")
        if not item.durations_s:
            raise self._unusable(f"{where}: no duration")
        for duration in item.durations_s:
            if not (math.isfinite(duration) and duration > 0.0):
                raise self._unusable(f"{where}: a duration of {duration} s is not a positive number")

    def _unusable(self, message: str) -> LemixError:
        return LemixError(ErrorCode.INTERNAL, f"the timings of node {self._info.node_id} are unusable: {message}")


def _key(item: profile_pb2.Measurement) -> _Key:
    return (
        item.stage,
        item.op,
        item.batch,
        item.length,
        item.cached_tokens,
        item.decodes,
        item.decode_length,
        item.num_bytes,
        item.busy,
    )


def _name(point: node_pb2.GridPoint) -> str:
    """A point for a person: "PREFILL 2 x 128"."""
    name = f"{_kind(point.op)} {point.batch} x {point.length}"
    if point.cached_tokens:
        name += f" behind {point.cached_tokens}"
    if point.decodes:
        name += f" with {point.decodes} decodes"
    if point.busy:
        name += f" beside {_kind(point.busy)}"
    return name


def _kind(op: profile_pb2.OpKind) -> str:
    return profile_pb2.OpKind.Name(op).removeprefix("OP_KIND_")
