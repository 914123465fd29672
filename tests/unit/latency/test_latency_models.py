"""What latency models, tables and their combinations predict, and what they refuse."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.latency import (
    FORMS,
    HostLink,
    Interference,
    LatencyModel,
    LatencyTable,
    MixedCost,
    NodeLatency,
    OpKind,
)

BATCHES, LENGTHS = (1, 2, 8), (16, 64, 256)


def table_of(function) -> LatencyTable:
    durations = tuple(function(batch, length) for batch in BATCHES for length in LENGTHS)
    return LatencyTable(BATCHES, LENGTHS, durations)


def tabulated(function) -> LatencyModel:
    return LatencyModel("tabulated", (), table=table_of(function))


coefficient = st.floats(1e-9, 1e-3)


@given(coefficient, coefficient, st.floats(1, 64), st.floats(16, 4096))
def test_a_table_of_a_bilinear_law_is_that_law_everywhere(base, slope, batch, length):
    table = table_of(lambda b, n: base + slope * b * n)
    assert table.at_s(batch, length) == pytest.approx(base + slope * batch * length, rel=1e-6)


@given(
    st.lists(st.floats(1e-6, 10.0), min_size=9, max_size=9),
    st.floats(0, 100),
    st.floats(0, 1e4),
    st.floats(0, 1e4),
)
def test_no_table_predicts_a_negative_time_nor_less_for_cached_tokens(durations, batch, length, cached):
    model = LatencyModel("tabulated", (), table=LatencyTable(BATCHES, LENGTHS, tuple(durations)))
    alone = model.predict_s(batch, length)
    assert 0.0 <= alone < math.inf
    assert model.predict_s(batch, length, cached) >= alone


def test_a_table_passes_through_its_points_and_keeps_within_the_cell():
    table = table_of(lambda b, n: 1.0 + (b * n > 100))
    for batch in BATCHES:
        for length in LENGTHS:
            assert table.at_s(batch, length) == 1.0 + (batch * length > 100)
    assert table.at_s(1, 160) == 1.5


def test_below_the_grid_an_operation_is_short_but_not_free():
    table = LatencyTable((1,), (16, 64), (1.0, 10.0))  # the line would be below zero at 1
    assert table.at_s(1, 1) == pytest.approx(1.0 / 16.0)
    assert table.at_s(5, 64) == 10.0  # one batch: nothing is known of others


@given(st.lists(st.floats(1e-6, 10.0), min_size=9, max_size=9), st.floats(0, 100), st.floats(0, 1e5))
def test_beyond_the_grid_no_operation_takes_less_than_at_its_edge(durations, batch, length):
    table = LatencyTable(BATCHES, LENGTHS, tuple(durations))
    edge = table.at_s(min(batch, BATCHES[-1]), min(length, LENGTHS[-1]))
    assert table.at_s(batch, length) >= edge
    falling = LatencyTable((1,), (256, 512), (0.0101, 0.01))  # noise of 1 %
    assert falling.at_s(1, 40_000) == 0.01


@given(
    st.sampled_from(["quadratic", "affine", "full", "constant"]),
    st.lists(coefficient, min_size=3, max_size=3),
    st.integers(1, 16),
    st.integers(1, 512),
    st.integers(0, 512),
)
def test_behind_cached_tokens_only_the_difference_is_computed(form, values, batch, length, cached):
    model = LatencyModel(form, tuple(values[: len(FORMS[form](1, 1))]))
    whole, before, nothing = (model.predict_s(batch, tokens) for tokens in (cached + length, cached, 0))
    assert model.predict_s(batch, length, cached) == pytest.approx(whole - before + nothing)


def test_a_table_predicts_cached_prefill_by_the_same_rule():
    model = tabulated(lambda b, n: 0.5 + b * n)
    assert model.predict_s(2, 64, 192) == pytest.approx(0.5 + 2 * 64)


def test_the_interval_is_about_the_prediction_and_its_noise_as_wide():
    model = LatencyModel("constant", (2.0,), 0.1, -0.25, 0.5)
    assert model.interval_s(1, 1) == (1.5, 3.0)
    assert model.noise == pytest.approx(0.75 / 3.29)
    assert LatencyModel("constant", (2.0,), residual_p5=-2.0).interval_s(1, 1)[0] == 0.0
    assert LatencyModel("constant", (2.0,), residual_p95=9.0).noise == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LatencyModel("cubic", (1.0,)), "unknown latency form 'cubic'"),
        (lambda: LatencyModel("affine", (1.0,)), "takes 2 coefficients, got 1"),
        (lambda: LatencyModel("tabulated", ()), "needs a table"),
        (lambda: LatencyModel("affine", (1.0, 1.0), table=table_of(lambda b, n: 1.0)), "takes no table"),
        (lambda: LatencyModel("affine", (1.0, math.nan)), "not a finite number"),
        (lambda: LatencyModel("constant", (1.0,), mape=math.inf), "not a finite number"),
        (lambda: LatencyModel("constant", (1.0,), residual_p5=math.nan), "not a finite number"),
        (lambda: LatencyModel("constant", (1.0,), residual_p95=math.inf), "not a finite number"),
        (lambda: LatencyModel("constant", (1.0,), residual_p5=-1.5, residual_p95=-1.0), "residual_p95"),
        (lambda: LatencyTable((2, 1), (1,), (1.0, 1.0)), "batches of a latency table must rise"),
        (lambda: LatencyTable((1,), (), ()), "lengths of a latency table must rise"),
        (lambda: LatencyTable((0,), (1,), (1.0,)), "batches of a latency table must rise from at least 1"),
        (lambda: LatencyTable((1,), (1, 2), (1.0,)), "2 points has 1 durations"),
        (lambda: LatencyTable((1,), (1,), (math.nan,)), "not a positive number"),
        (lambda: HostLink(0.0, 1.0), "offload_bytes_per_s"),
        (lambda: HostLink(1.0, math.nan), "reload_bytes_per_s"),
        (lambda: HostLink(1.0, 1.0, -1.0), "fixed_s"),
        (lambda: MixedCost(shared=-1.0), "shared of a mixed cost"),
        (lambda: Interference(0, OpKind.DECODE, OpKind.PREFILL, -1.0), "slowdown of decode beside prefill"),
        (lambda: NodeLatency(({}, {}), host_links=(HostLink(1.0, 1.0),)), "1 host_links for 2 stages"),
        (lambda: NodeLatency(({},), mixed=(MixedCost(),) * 2), "2 mixed for 1 stages"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_node_says_what_runs_together_beside_and_between():
    node = NodeLatency(
        ({OpKind.PREFILL: LatencyModel("full", (1.0, 0.0, 0.01))},),
        (Interference(0, OpKind.PREFILL, OpKind.TRAIN_BACKWARD, 0.5),),
        (HostLink(10.0, 20.0, 0.5),),
        (MixedCost(1.0, 1.0, 0.5),),
    )
    assert node.op_s(0, OpKind.PREFILL, 1, 10, cached=5) == pytest.approx(1.0 + 0.01 * (15**2 - 5**2))
    assert node.slowdown(0, OpKind.PREFILL, OpKind.TRAIN_BACKWARD) == 0.5
    assert node.slowdown(0, OpKind.PREFILL, OpKind.DECODE) == 0.0
    assert node.mixed_s(0, 3.0, 1.0) == 3.5
    assert node.host_links[0].move_s(OpKind.OFFLOAD, 100) == 10.5
    assert node.host_links[0].move_s(OpKind.RELOAD, 100) == 5.5
    assert NodeLatency(({},)).mixed_s(0, 3.0, 1.0) == 4.0


def test_a_slowdown_is_shared_out_among_the_neighbours_that_are_busy():
    backward, decode = OpKind.TRAIN_BACKWARD, OpKind.DECODE
    node = NodeLatency(({},) * 3, (Interference(0, decode, backward, 0.6), Interference(0, decode, decode, -0.2)))
    assert node.slowdown_beside(0, decode, ()) == 0.0
    assert node.slowdown_beside(0, decode, (backward,)) == pytest.approx(0.3)
    assert node.slowdown_beside(0, decode, (backward, decode)) == pytest.approx(0.2)
    assert node.slowdown_beside(0, decode, (backward, backward)) == pytest.approx(0.6)
    assert node.slowdown_beside(1, decode, (backward, backward)) == 0.0


@given(st.floats(0, 5), st.floats(0, 5), st.floats(0, 5), st.floats(0, 10), st.floats(0, 10))
def test_together_never_takes_less_than_the_longer_share(prefill, decode, shared, prefill_s, decode_s):
    cost = MixedCost(prefill, decode, shared)
    assert cost.predict_s(prefill_s, decode_s) >= max(prefill * prefill_s, decode * decode_s)
