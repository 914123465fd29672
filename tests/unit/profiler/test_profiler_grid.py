"""The grid stays within the node's limits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lemix.internal.v1 import profile_pb2
from services.profiler.config import GridSettings, OpGrid, ProfilerSettings
from services.profiler.grid import grid_points


def triples(grid, **limits):
    return [(point.op, point.batch, point.length) for point in grid_points(grid, **limits)]


@given(max_batch=st.integers(1, 64), max_context=st.integers(2, 4096), max_tokens=st.integers(1, 8192))
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
    lengths = {length for _, _, length in triples(grid, max_batch=0, max_context_tokens=0)}
    assert max(lengths) == max(grid.prefill.lengths)


def test_the_default_grid_is_enough_to_fit_on_a_short_context():
    points = triples(GridSettings(), max_batch=4, max_context_tokens=64)
    for op in (profile_pb2.OP_KIND_PREFILL, profile_pb2.OP_KIND_DECODE, profile_pb2.OP_KIND_TRAIN_FORWARD):
        assert sum(point[0] == op for point in points) >= 4


@pytest.mark.parametrize(
    "bad",
    [{"repetitions": 1}, {"repetitions": 101}, {"warmup": 11}, {"grid": {"decode": {"batches": [], "lengths": [1]}}}],
)
def test_unusable_settings_are_refused(bad):
    with pytest.raises(ValidationError):
        ProfilerSettings.model_validate(bad)
