"""Grid of points to measure on a node, the most useful ones first: pure."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lemix.internal.v1 import node_agent_service_pb2 as node_pb2
from lemix.internal.v1 import profile_pb2
from services.profiler.config import GridSettings, OpGrid

_PREFILL = profile_pb2.OP_KIND_PREFILL
_DECODE = profile_pb2.OP_KIND_DECODE
_TRAIN = profile_pb2.OP_KIND_TRAIN_FORWARD

#: So many points of serving and training come before anything else: the richest form needs four, one is held out.
_FIRST = 5
#: Points measured beside busy stages: places in the order of the grid's points by size (0: smallest, 1: largest).
_BESIDE = {_PREFILL: (0.5, 0.85), _DECODE: (0.5,), _TRAIN: (0.5,)}


class Limits(NamedTuple):
    """Of a node; 0 is no limit. kv_bytes: of the stage with the largest KV cache."""

    max_batch: int = 0
    max_context_tokens: int = 0
    num_stages: int = 1
    kv_bytes: int = 0
    kv_bytes_per_token: int = 0


def limits_of(info: node_pb2.GetNodeInfoResponse) -> Limits:
    """What a node says of itself."""
    return Limits(
        info.max_batch,
        info.max_context_tokens,
        info.num_stages,
        info.kv_bytes_per_token * info.kv_capacity_tokens,
        info.kv_bytes_per_token,
    )


def grid_points(grid: GridSettings, limits: Limits) -> list[node_pb2.GridPoint]:
    """Points within the node's limits, each once: those of serving and training first, those far apart first.

    A value beyond a limit is lowered to it, so that the largest possible operation is measured.
    """
    max_prompt_tokens = limits.max_context_tokens - 1  # serving leaves room for the token that is made
    prefills = _pairs(_PREFILL, grid.prefill, limits.max_batch, max_prompt_tokens, grid.max_point_tokens)
    # A decode step reads the context but computes one token per sequence: no bound on batch * length.
    decodes = _pairs(_DECODE, grid.decode, limits.max_batch, max_prompt_tokens, 0)
    trains = _pairs(_TRAIN, grid.train, 0, limits.max_context_tokens, grid.max_point_tokens)
    groups = [_far_apart_first(points) for points in (prefills, decodes, trains)]
    first = _in_turn([points[:_FIRST] for points in groups])
    if grid.whole_model_ops:
        first.append(node_pb2.GridPoint(op=profile_pb2.OP_KIND_OPTIMIZER_STEP, batch=1, length=1))
        first.append(node_pb2.GridPoint(op=profile_pb2.OP_KIND_WEIGHT_SYNC, batch=1, length=1))
    others = [points[_FIRST:] for points in groups]
    others += [_cached(grid, max_prompt_tokens), _mixed(grid, limits), _moves(grid, limits)]
    if grid.co_run and limits.num_stages > 1:
        others += [_beside(points) for points in (prefills, decodes, trains)]
    return first + _in_turn(others)


def _pairs(
    op: profile_pb2.OpKind, grid: OpGrid, max_batch: int, max_length: int, max_tokens: int
) -> list[node_pb2.GridPoint]:
    return [
        node_pb2.GridPoint(op=op, batch=batch, length=length)
        for batch in _lowered(grid.batches, max_batch)
        for length in _lowered(grid.lengths, max_length)
        if max_tokens <= 0 or batch * length <= max_tokens
    ]


def _cached(grid: GridSettings, max_prompt_tokens: int) -> list[node_pb2.GridPoint]:
    lengths = _lowered(grid.cached.lengths, max_prompt_tokens - 1)
    points = {
        (length, min(cached, max_prompt_tokens - length) if max_prompt_tokens > 0 else cached): None
        for length in lengths
        for cached in grid.cached.cached_tokens
    }
    return [
        node_pb2.GridPoint(op=_PREFILL, batch=1, length=length, cached_tokens=cached)
        for length, cached in points
        if cached > 0
    ]


def _mixed(grid: GridSettings, limits: Limits) -> list[node_pb2.GridPoint]:
    max_prompt_tokens = limits.max_context_tokens - 1
    context = grid.mixed.decode_length
    return [
        node_pb2.GridPoint(
            op=_PREFILL,
            batch=1,
            length=length,
            decodes=decodes,
            decode_length=min(context, max_prompt_tokens) if max_prompt_tokens > 0 else context,
        )
        for length in _lowered(grid.mixed.lengths, max_prompt_tokens)
        for decodes in _lowered(grid.mixed.decodes, limits.max_batch)
    ]


def _moves(grid: GridSettings, limits: Limits) -> list[node_pb2.GridPoint]:
    per_token = max(1, limits.kv_bytes_per_token)
    return [
        node_pb2.GridPoint(
            op=profile_pb2.OP_KIND_OFFLOAD, batch=1, length=-(-num_bytes // per_token), num_bytes=num_bytes
        )
        for num_bytes in _lowered(grid.move_bytes, limits.kv_bytes)
    ]


def _beside(points: Sequence[node_pb2.GridPoint]) -> list[node_pb2.GridPoint]:
    """A few points of one operation, each beside either kind of work."""
    if not points:
        return []
    by_size = sorted(points, key=lambda point: (point.batch * point.length, point.batch))
    chosen = {round(place * (len(by_size) - 1)): None for place in _BESIDE[points[0].op]}
    return [
        node_pb2.GridPoint(op=by_size[index].op, batch=by_size[index].batch, length=by_size[index].length, busy=busy)
        for index in chosen
        for busy in (_TRAIN, _DECODE)
    ]


def _lowered(values: Iterable[int], limit: int) -> list[int]:
    return sorted({min(value, limit) if limit > 0 else value for value in values})


def _far_apart_first(points: Sequence[node_pb2.GridPoint]) -> list[node_pb2.GridPoint]:
    """The smallest, the largest, then always the one farthest from those before: however few are measured, they span
    the grid."""
    left = sorted(points, key=lambda point: (point.batch * point.length, point.batch))
    if len(left) < 3:
        return left
    ordered = [left.pop(0), left.pop()]
    while left:
        farthest = max(left, key=lambda point: min(_distance(point, other) for other in ordered))
        left.remove(farthest)
        ordered.append(farthest)
    return ordered


def _distance(one: node_pb2.GridPoint, other: node_pb2.GridPoint) -> float:
    return math.hypot(math.log2(one.batch / other.batch), math.log2(one.length / other.length))


def _in_turn(groups: Sequence[Sequence[node_pb2.GridPoint]]) -> list[node_pb2.GridPoint]:
    """The first of every group, then the second of every group, and so on."""
    longest = max(map(len, groups), default=0)
    return [group[index] for index in range(longest) for group in groups if index < len(group)]
