"""A profile artifact from the times of the stages: a grid of points, fitted like those measured on a node."""

from collections.abc import Iterator, Sequence
from itertools import product

from lemix.internal.v1 import profile_pb2
from services.latency import OpKind
from services.model_shape import HALF_BYTES
from services.profiler.convert import PROTO_OF_KIND
from services.profiler.fit_profile import fit_profile
from services.profiler.vidur.stage_times import TRAINED_BYTES, StageTimes
from services.profiler.vidur.tables import Spread

_BATCHES = (1, 2, 4, 8)
_LENGTHS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
_TRAIN_LENGTHS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
_DECODE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
_DECODE_LENGTHS = (64, 256, 1024, 4096)
#: A prompt in pieces, behind what is cached or with requests that decode.
_CHUNKS = (64, 256, 1024)
_CACHED = (512, 1024, 2048)
_MIXED_DECODES = (8, 32)
_MIXED_CONTEXT = 1024
_MOVED_BYTES = (1 << 20, 16 << 20, 256 << 20)


def profile_of(
    stages: Sequence[StageTimes], *, name: str, model: str, source: str, created_unix_s: float
) -> profile_pb2.Profile:
    """The artifact of a node with these stages; `name` is its fingerprint, of which it is the first version."""
    profile = profile_pb2.Profile(
        profile_id=f"{name}-1",
        fingerprint=name,
        version=1,
        created_unix_s=created_unix_s,
        num_stages=len(stages),
        model=model,
        measurements=[point for times in stages for point in _points(times)],
        peak_memory_bytes=[times.parameters * TRAINED_BYTES for times in stages],
        engine="emulated",
        device=stages[0].target.name,
        dtype="bfloat16",
        memory=[_memory(times) for times in stages],
        source=source,
    )
    fit_profile(profile)
    return profile


def _points(times: StageTimes) -> Iterator[profile_pb2.Measurement]:
    stage = times.stage
    for batch, length in product(_BATCHES, _LENGTHS):
        yield _point(stage, OpKind.PREFILL, times.prefill(batch, length), batch, length)
    for length, cached in product(_CHUNKS, _CACHED):
        spread = times.prefill(1, length, cached)
        yield _point(stage, OpKind.PREFILL, spread, 1, length, cached_tokens=cached)
    for length, decodes in product(_CHUNKS, _MIXED_DECODES):
        spread = times.prefill(1, length, decodes=decodes, decode_length=_MIXED_CONTEXT)
        yield _point(stage, OpKind.PREFILL, spread, 1, length, decodes=decodes, decode_length=_MIXED_CONTEXT)
    for batch, length in product(_DECODE_BATCHES, _DECODE_LENGTHS):
        yield _point(stage, OpKind.DECODE, times.decode(batch, length), batch, length)
    for batch, length in product(_BATCHES, _TRAIN_LENGTHS):
        yield _point(stage, OpKind.TRAIN_FORWARD, times.train_forward(batch, length), batch, length)
        yield _point(stage, OpKind.TRAIN_BACKWARD, times.train_backward(batch, length), batch, length)
    yield _point(stage, OpKind.OPTIMIZER_STEP, Spread.exactly(times.optimizer_step_s()), 1, 1)
    yield _point(stage, OpKind.WEIGHT_SYNC, Spread.exactly(times.weight_sync_s()), 1, 1)
    for num_bytes, op in product(_MOVED_BYTES, (OpKind.OFFLOAD, OpKind.RELOAD)):
        yield _point(stage, op, Spread.exactly(times.host_copy_s(num_bytes)), 1, 1, num_bytes=num_bytes)


def _memory(times: StageTimes) -> profile_pb2.StageMemory:
    return profile_pb2.StageMemory(
        stage=times.stage,
        weight_bytes=times.parameters * HALF_BYTES,
        fixed_bytes=times.parameters * TRAINED_BYTES,
        activation_bytes_per_token=times.shape.activation_bytes_per_token(times.num_layers),
        kv_bytes_per_token=times.shape.kv_bytes_per_token(times.num_layers),
    )


def _point(
    stage: int, op: OpKind, spread: Spread, batch: int, length: int, **condition: int
) -> profile_pb2.Measurement:
    durations_s = [float(f"{value:.4g}") for value in (spread.least, spread.median, spread.most)]
    point = profile_pb2.Measurement(stage=stage, op=PROTO_OF_KIND[op], batch=batch, length=length)
    point.durations_s.extend(durations_s)
    for name, value in condition.items():
        setattr(point, name, value)
    return point
