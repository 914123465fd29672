"""The grid stays within the node's limits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lemix.internal.v1 import profile_pb2
from services.profiler.config import GridSettings, OpGrid, ProfilerSettings
from services.profiler.grid import Limits, grid_points


def triples(grid, **limits):
    """Operation, batch and length of the plain points."""
    return [(point.op, point.batch, point.length) for point in grid_points(grid, Limits(**limits)) if is_plain(point)]


def is_plain(point):
    return not (point.cached_tokens or point.decodes or point.num_bytes or point.busy)


@given(max_batch=st.integers(1, 64), max_context=st.integers(2, 4096), max_tokens=st.integers(16, 8192))
def test_no_point_is_beyond_the_limits_or_there_twice(max_batch, max_context, max_tokens):
    grid = GridSettings(max_point_tokens=max_tokens)
    points = triples(grid, max_batch=max_batch, max_context_tokens=max_context)
    assert len(points) == len(set(points))
    for op, batch, length in points:
        assert 1 <= length <= max_context
        if op in (profile_pb2.OP_KIND_PREFILL, profile_pb2.OP_KIND_TRAIN_FORWARD):
            assert batch * length <= max_tokens
        if op in (profile_pb2.OP_KIND_PREFILL, profile_pb2.OP_KIND_DECODE):
            assert batch <= max_batch


@pytest.mark.parametrize(
    ("op", "field", "longest"),
    [
        (profile_pb2.OP_KIND_PREFILL, "prefill", 99),  # serving leaves room for the token that is made
        (profile_pb2.OP_KIND_DECODE, "decode", 99),
        (profile_pb2.OP_KIND_TRAIN_FORWARD, "train", 100),
    ],
)
def test_a_length_beyond_the_context_is_lowered_to_it(op, field, longest):
    grid = GridSettings(**{field: OpGrid(batches=(1,), lengths=(16, 1000, 2000))})
    points = [point for point in triples(grid, max_batch=8, max_context_tokens=100) if point[0] == op]
    assert points == [(op, 1, 16), (op, 1, longest)]


def test_zero_limits_are_no_limits():
    grid = GridSettings()
    lengths = {length for _, _, length in triples(grid)}
    assert max(lengths) == max(grid.prefill.lengths)


def test_the_default_grid_is_enough_to_fit_on_a_short_context():
    points = triples(GridSettings(), max_batch=4, max_context_tokens=64)
    for op in (profile_pb2.OP_KIND_PREFILL, profile_pb2.OP_KIND_DECODE, profile_pb2.OP_KIND_TRAIN_FORWARD):
        assert sum(point[0] == op for point in points) >= 4


DEFAULT = Limits(max_batch=16, max_context_tokens=512, num_stages=2, kv_bytes=1 << 24, kv_bytes_per_token=512)


def test_every_point_is_within_the_node_whatever_it_holds():
    limits = Limits(max_batch=4, max_context_tokens=64, num_stages=2, kv_bytes=1000, kv_bytes_per_token=100)
    points = grid_points(GridSettings(), limits)
    assert len(points) == len({point.SerializeToString(deterministic=True) for point in points})
    for point in points:
        assert point.cached_tokens + point.length <= 64
        assert point.decodes <= 4
        assert point.decode_length < 64
        assert point.num_bytes <= 1000
    assert {(p.num_bytes, p.length) for p in points if p.num_bytes} == {(1000, 10)}


def test_what_the_scheduler_needs_most_comes_first():
    points = grid_points(GridSettings(), DEFAULT)
    first = points[:17]
    assert all(map(is_plain, first))
    assert {point.op for point in first} == set(range(1, 7)) - {profile_pb2.OP_KIND_TRAIN_BACKWARD}
    prefills = [(point.batch, point.length) for point in first if point.op == profile_pb2.OP_KIND_PREFILL]
    assert prefills[:2] == [(1, 16), (4, 511)]  # the smallest and the largest


def test_points_of_every_kind_are_there():
    points = grid_points(GridSettings(), DEFAULT)
    assert {point.busy for point in points} == {0, profile_pb2.OP_KIND_DECODE, profile_pb2.OP_KIND_TRAIN_FORWARD}
    assert any(point.cached_tokens for point in points)
    assert any(point.decodes for point in points)
    assert any(point.op == profile_pb2.OP_KIND_OFFLOAD for point in points)
    # What a point takes beside busy stages is compared with what it takes alone.
    alone = {(point.op, point.batch, point.length) for point in points if is_plain(point)}
    assert {(point.op, point.batch, point.length) for point in points if point.busy} <= alone


def test_a_node_of_one_stage_has_no_busy_neighbour():
    assert not any(point.busy for point in grid_points(GridSettings(), DEFAULT._replace(num_stages=1)))


@pytest.mark.parametrize(
    "bad",
    [
        {"repetitions": 1},
        {"repetitions": 101},
        {"warmup": 11},
        {"grid": {"prefill": {"batches": [0], "lengths": [1]}}},
        {"grid": {"decode": {"batches": [], "lengths": [1]}}},
    ],
)
def test_unusable_settings_are_refused(bad):
    with pytest.raises(ValidationError):
        ProfilerSettings.model_validate(bad)


@pytest.mark.parametrize("name", ["prefill", "train"])
def test_a_grid_without_a_point_is_refused(name):
    large = OpGrid(batches=(4,), lengths=(1024,))
    assert GridSettings(max_point_tokens=4096, **{name: large})
    with pytest.raises(ValidationError, match=f"leaves no point of {name}, whose smallest has 4096 tokens"):
        GridSettings(max_point_tokens=4095, **{name: large})
