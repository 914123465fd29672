"""What a MeasureOps request may ask for."""

import math

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import node_agent_service_pb2 as node_pb2
from lemix.internal.v1 import profile_pb2
from services.latency import OpKind
from services.node_agent.convert import OP_KIND_FROM_PROTO, example_from_proto
from services.node_agent.engine.base import ModelInfo
from services.node_agent.engine.training_ops import Example

_MAX_REPETITIONS = 100
_MAX_ROUNDS = 100
_MAX_WARMUP = 10
_MAX_POINTS = 10_000
_MAX_SAMPLES = 10_000
_MAX_SEQUENCES = 65_536
#: Kinds a request may name; the backward is timed together with its forward, a reload with its offload.
_KINDS = frozenset(OpKind) - {OpKind.TRAIN_BACKWARD, OpKind.RELOAD}
#: What the other stages can be kept busy with.
BUSY_KINDS = frozenset((OpKind.DECODE, OpKind.TRAIN_FORWARD))


def check_request(
    request: node_pb2.MeasureOpsRequest, info: ModelInfo, *, num_stages: int, kv_capacity_tokens: int
) -> list[Example]:
    """The samples as examples. Raises LemixError INVALID_REQUEST naming the field at fault."""
    if not 1 <= request.repetitions <= _MAX_REPETITIONS:
        raise _refusal(f"repetitions must be 1 to {_MAX_REPETITIONS}", "repetitions")
    if request.rounds > _MAX_ROUNDS:
        raise _refusal(f"rounds must be at most {_MAX_ROUNDS}", "rounds")
    if request.warmup > _MAX_WARMUP:
        raise _refusal(f"warmup must be at most {_MAX_WARMUP}", "warmup")
    if not (math.isfinite(request.budget_s) and request.budget_s >= 0.0):
        raise _refusal("budget_s must be at least 0", "budget_s")
    if not request.points and not request.samples:
        raise _refusal("points must be at least one: there is nothing to measure", "points")
    if len(request.points) > _MAX_POINTS or len(request.samples) > _MAX_SAMPLES:
        raise _refusal(f"at most {_MAX_POINTS} points and {_MAX_SAMPLES} samples", "points")
    if request.samples and request.allow_busy:
        raise _refusal("samples cannot be computed between the operations of other work", "samples")
    most_bytes = info.kv_bytes_per_token * kv_capacity_tokens
    for index, point in enumerate(request.points):
        message = _fault(point, info.max_context_tokens, num_stages, most_bytes)
        if message:
            raise _refusal(message, f"points.{index}")
    return [example_from_proto(sample, info) for sample in request.samples]


def _fault(point: node_pb2.GridPoint, max_context_tokens: int, num_stages: int, most_bytes: int) -> str:
    """Why a point cannot be measured; empty when it can. most_bytes: 0 is no limit."""
    kind = OP_KIND_FROM_PROTO.get(point.op)
    if kind not in _KINDS:
        return f"operation {point.op} cannot be measured"
    if not 1 <= point.batch <= _MAX_SEQUENCES or point.length < 1:
        return f"batch must be 1 to {_MAX_SEQUENCES}, length at least 1"
    if kind is OpKind.OFFLOAD:
        if point.num_bytes < 1 or (most_bytes and point.num_bytes > most_bytes):
            return f"num_bytes must be 1 to {most_bytes}, the KV cache of a stage"
    elif point.num_bytes or point.cached_tokens + point.length > max_context_tokens:
        return f"length with cached tokens must be 1 to {max_context_tokens}, num_bytes is for offloading"
    if kind is not OpKind.PREFILL and (point.cached_tokens or point.decodes):
        return "cached_tokens and decodes must be those of a prefill"
    if bool(point.decodes) != bool(point.decode_length) or point.decode_length >= max_context_tokens:
        return f"decode_length must be 1 to {max_context_tokens - 1} where requests decode, and only there"
    if point.decodes > _MAX_SEQUENCES:
        return f"decodes must be at most {_MAX_SEQUENCES}"
    if point.busy != profile_pb2.OP_KIND_UNSPECIFIED:
        if OP_KIND_FROM_PROTO.get(point.busy) not in BUSY_KINDS:
            return f"the other stages cannot be kept busy with operation {point.busy}"
        if num_stages < 2:
            return "busy must be left out: there is no other stage"
    return ""


def _refusal(message: str, param: str) -> LemixError:
    return LemixError(ErrorCode.INVALID_REQUEST, message, param=param)
