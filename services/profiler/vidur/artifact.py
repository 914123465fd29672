"""A profile artifact from the times of the stages: a grid of points, fitted like those measured on a node."""

from collections.abc import Iterator, Sequence

from lemix.internal.v1 import profile_pb2
from services.profiler.fit_profile import fit_profile
from services.profiler.vidur.stage_times import HOST_COPY_FIXED_S, TRAINED_BYTES, StageTimes
from services.profiler.vidur.tables import Spread

_BATCHES = (1, 2, 4, 8)
_LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_TRAIN_LENGTHS = (128, 256, 512, 1024, 2048, 4096)
_DECODE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
_DECODE_LENGTHS = (64, 256, 1024, 4096)
#: More tokens in one operation are no use to anybody.
_MOST_TOKENS = 16384


def profile_of(
    stages: Sequence[StageTimes], *, name: str, model: str, source: str, created_unix_s: float
) -> profile_pb2.Profile:
    """The artifact of a node with these stages; `name` is its fingerprint, of which it is the first version."""
    measurements = [point for times in stages for point in _points(times)]
    profile = profile_pb2.Profile(
        profile_id=f"{name}-1",
        fingerprint=name,
        version=1,
        created_unix_s=created_unix_s,
        num_stages=len(stages),
        model=model,
        measurements=measurements,
        peak_memory_bytes=[times.parameters * TRAINED_BYTES for times in stages],
        engine="emulated",
        device=stages[0].target.name,
        dtype="bfloat16",
        host_links=[_host_link(times) for times in stages],
        source=source,
    )
    fit_profile(profile)
    return profile


def _points(times: StageTimes) -> Iterator[profile_pb2.Measurement]:
    stage = times.stage
    for batch in _BATCHES:
        for length in _LENGTHS:
            if batch * length <= _MOST_TOKENS:
                yield _point(stage, profile_pb2.OP_KIND_PREFILL, times.prefill(batch, length), batch, length)
    for batch in _DECODE_BATCHES:
        for length in _DECODE_LENGTHS:
            yield _point(stage, profile_pb2.OP_KIND_DECODE, times.decode(batch, length), batch, length)
    for batch in _BATCHES:
        for length in _TRAIN_LENGTHS:
            if batch * length <= _MOST_TOKENS:
                forward, backward = times.train_forward(batch, length), times.train_backward(batch, length)
                yield _point(stage, profile_pb2.OP_KIND_TRAIN_FORWARD, forward, batch, length)
                yield _point(stage, profile_pb2.OP_KIND_TRAIN_BACKWARD, backward, batch, length)
    step, sync = Spread.exactly(times.optimizer_step_s()), Spread.exactly(times.weight_sync_s())
    yield _point(stage, profile_pb2.OP_KIND_OPTIMIZER_STEP, step, 1, 1)
    yield _point(stage, profile_pb2.OP_KIND_WEIGHT_SYNC, sync, 1, 1)


def _point(stage: int, op: profile_pb2.OpKind, spread: Spread, batch: int, length: int) -> profile_pb2.Measurement:
    durations_s = [float(f"{value:.4g}") for value in (spread.least, spread.median, spread.most)]
    return profile_pb2.Measurement(stage=stage, op=op, batch=batch, length=length, durations_s=durations_s)


def _host_link(times: StageTimes) -> profile_pb2.HostLink:
    rate = times.target.host_copy_bytes_per_s
    return profile_pb2.HostLink(
        stage=times.stage, offload_bytes_per_s=rate, reload_bytes_per_s=rate, fixed_s=HOST_COPY_FIXED_S
    )
