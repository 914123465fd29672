"""Coefficients learn from durations: how fast, how far, and what they are not moved by."""

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.latency import FORMS, LatencyModel, LatencyTable, NodeLatency, OpKind
from services.scheduler.core.calibration import Coefficients, SingleCoefficient, coefficients_of, terms_of
from services.scheduler.core.costs import NodeCosts

SIGMA = 0.1
FULL = LatencyModel("full", (2e-3, 1e-4, 1e-8))


def learn(coefficients: Coefficients, batch: float, length: float, real_s: float, cached: float = 0.0) -> float:
    profiled_s = coefficients.profiled_s(batch, length, cached)
    return coefficients.observe(profiled_s, real_s, SIGMA, batch, length, cached)


def predicted_s(coefficients: Coefficients, batch: float, length: float, cached: float = 0.0) -> float:
    a, b, c, d = coefficients.terms
    return a + batch * (b + length * (c + (length + 2.0 * cached) * d))


@given(
    form=st.sampled_from(sorted(FORMS)),
    values=st.tuples(*[st.floats(1e-6, 0.1)] * 3),
    batch=st.integers(1, 64),
    length=st.integers(1, 4096),
    cached=st.integers(0, 4096),
)
def test_begin_with_the_profile(
    form: str, values: tuple[float, float, float], batch: int, length: int, cached: int
) -> None:
    model = LatencyModel(form, values[: len(FORMS[form](1.0, 1.0, 0.0))])
    coefficients = Coefficients(model)
    assert coefficients.profiled_s(batch, length, cached) == pytest.approx(model.predict_s(batch, length, cached))
    assert coefficients.terms == terms_of(model)
    assert learn(coefficients, batch, length, model.predict_s(batch, length, cached), cached) == pytest.approx(0.0)
    assert coefficients.terms == pytest.approx(terms_of(model)), "what is as predicted teaches nothing new"


@pytest.mark.parametrize("factors", [(2.0, 2.0, 2.0), (0.5, 0.5, 0.5), (2.0, 0.5, 1.0), (1.0, 2.0, 0.5)])
def test_every_coefficient_is_found_when_sizes_tell_them_apart(factors: tuple[float, float, float]) -> None:
    coefficients = Coefficients(FULL)
    values = zip(FULL.coefficients, factors, strict=True)
    real = LatencyModel("full", tuple(value * factor for value, factor in values))
    random = Random(1)
    for _ in range(1000):
        length = random.choice((1.0, 32.0, 512.0, 8192.0, 32768.0))
        learn(coefficients, 1.0, length, real.predict_s(1.0, length))
    assert coefficients.terms == pytest.approx(terms_of(real), rel=0.02)


def test_a_coefficient_that_the_profile_found_to_be_zero_is_learnt_too() -> None:
    coefficients = Coefficients(LatencyModel("affine", (0.0, 1e-4)))
    real = LatencyModel("affine", (0.02, 1e-4))
    random = Random(2)
    for _ in range(1000):
        length = float(random.choice((10, 100, 1000)))
        learn(coefficients, 1.0, length, real.predict_s(1.0, length))
    assert predicted_s(coefficients, 1.0, 10.0) == pytest.approx(0.021, rel=0.05)
    assert predicted_s(coefficients, 1.0, 1000.0) == pytest.approx(0.12, rel=0.05)


@pytest.mark.parametrize(("form", "values"), [("full", (2e-3, 1e-4, 0.0)), ("full_decode", (2e-3, 1e-4, 0.0))])
@pytest.mark.parametrize("first_tokens", [1, 16])
def test_small_operations_do_not_make_noise_of_large_ones_through_a_coefficient_that_was_zero(
    form: str, values: tuple[float, ...], first_tokens: int
) -> None:
    """Its unit comes from the first operation, of which a large one is a multiple."""
    model = LatencyModel(form, values)
    costs = NodeCosts(NodeLatency(({OpKind.PREFILL: model},)))
    random = Random(5)
    sizes = [(1, first_tokens)] + [(random.choice((1, 4, 16)), random.choice((16, 64, 256, 512))) for _ in range(600)]
    errors = []
    for index, (batch, length) in enumerate(sizes):
        real_s = model.predict_s(batch, length)
        if index >= 100:
            errors.append(abs(costs.stage_s(0, OpKind.PREFILL, batch, length) / real_s - 1.0))
        costs.calibrate(0, OpKind.PREFILL, batch, length, real_s * math.exp(random.gauss(0.0, 0.1)))
    assert sum(errors) / len(errors) < 0.04
    assert max(errors) < 0.2


@pytest.mark.parametrize("actual_s", [math.nan, math.inf, -1.0, 0.0])
def test_a_duration_that_is_none_teaches_nothing(actual_s: float) -> None:
    costs = NodeCosts(NodeLatency(({OpKind.PREFILL: FULL},)), drift_band=0.12)
    costs.calibrate(0, OpKind.PREFILL, 1, 100, actual_s)
    costs.calibrate_job("job", 0, OpKind.PREFILL, 1, 100, actual_s)
    assert costs.records() == []
    assert costs.stage_s(0, OpKind.PREFILL, 1, 100, job_id="job") == FULL.predict_s(1, 100)


def test_sizes_that_were_not_seen_follow_the_device_as_a_whole() -> None:
    coefficients = Coefficients(FULL)
    for _ in range(200):
        learn(coefficients, 1.0, 2000.0, 1.5 * FULL.predict_s(1.0, 2000.0))
    assert predicted_s(coefficients, 1.0, 2000.0) == pytest.approx(1.5 * FULL.predict_s(1.0, 2000.0), rel=0.01)
    assert predicted_s(coefficients, 1.0, 100.0) > 1.02 * FULL.predict_s(1.0, 100.0)


@pytest.mark.parametrize("outlier", [10.0, 1000.0])
def test_an_outlier_moves_a_prediction_by_little_and_later_by_less(outlier: float) -> None:
    coefficients = Coefficients(LatencyModel("constant", (0.01,)))
    learn(coefficients, 1, 1, outlier * 0.01)
    assert predicted_s(coefficients, 1, 1) <= 0.0125
    for _ in range(200):
        learn(coefficients, 1, 1, 0.01)
    learn(coefficients, 1, 1, outlier * 0.01)
    assert predicted_s(coefficients, 1, 1) <= 0.0103


def test_several_operations_in_a_row_that_are_far_off_are_a_change() -> None:
    coefficients = Coefficients(LatencyModel("constant", (0.01,)))
    for _ in range(500):
        learn(coefficients, 1, 1, 0.01)
    for _ in range(20):
        learn(coefficients, 1, 1, 0.05)
    assert predicted_s(coefficients, 1, 1) == pytest.approx(0.05, rel=0.1)


def test_an_hour_at_one_size_does_not_make_the_next_size_jump() -> None:
    """Exponential forgetting alone lets the covariance of what is not seen grow without bound."""
    random = Random(3)
    coefficients = Coefficients(LatencyModel("full_decode", (4e-3, 5e-4, 1e-6)))
    model = LatencyModel("full_decode", (4e-3, 5e-4, 1e-6))
    for _ in range(50_000):
        learn(coefficients, 8, 500, model.predict_s(8, 500) * math.exp(random.gauss(0.0, 0.1)))
    learn(coefficients, 1, 50, 1.2 * model.predict_s(1, 50))
    assert predicted_s(coefficients, 1, 50) == pytest.approx(model.predict_s(1, 50), rel=0.3)
    assert predicted_s(coefficients, 8, 500) == pytest.approx(model.predict_s(8, 500), rel=0.15)


@settings(max_examples=50)
@given(
    form=st.sampled_from(sorted(FORMS)),
    durations=st.lists(st.tuples(st.integers(1, 64), st.integers(1, 4096), st.floats(1e-9, 1e6)), max_size=60),
)
def test_coefficients_stay_positive_and_finite_whatever_is_reported(
    form: str, durations: list[tuple[int, int, float]]
) -> None:
    model = LatencyModel(form, (1e-3, 1e-4, 1e-6)[: len(FORMS[form](1.0, 1.0, 0.0))])
    costs = NodeCosts(NodeLatency(({OpKind.PREFILL: model},)))
    for batch, length, real_s in durations:
        costs.calibrate(0, OpKind.PREFILL, batch, length, real_s)
        value_s, profiled_s = costs.stage_s(0, OpKind.PREFILL, batch, length), model.predict_s(batch, length)
        assert 0.04 * profiled_s < value_s < 21.0 * profiled_s


def test_a_tabulated_model_is_corrected_by_one_ratio() -> None:
    table = LatencyTable(batches=(1, 8), lengths=(64, 512), durations_s=(0.01, 0.02, 0.03, 0.08))
    model = LatencyModel("tabulated", (), table=table)
    costs = NodeCosts(NodeLatency(({OpKind.DECODE: model},) * 2))
    assert costs.node_s(OpKind.DECODE, 4, 200) == pytest.approx(2 * model.predict_s(4, 200))
    for _ in range(50):
        costs.calibrate(1, OpKind.DECODE, 1, 64, 0.015)
    assert costs.stage_s(1, OpKind.DECODE, 8, 512) == pytest.approx(0.12, rel=0.01)
    assert costs.stage_s(0, OpKind.DECODE, 8, 512) == pytest.approx(0.08)


def test_stages_learn_apart_and_the_node_is_their_sum() -> None:
    costs = NodeCosts(NodeLatency(({OpKind.PREFILL: FULL},) * 2))
    for _ in range(100):
        costs.calibrate(1, OpKind.PREFILL, 1, 400, 2.0 * FULL.predict_s(1, 400))
    assert costs.stage_s(0, OpKind.PREFILL, 1, 400) == pytest.approx(FULL.predict_s(1, 400), rel=1e-12)
    assert costs.stage_s(1, OpKind.PREFILL, 1, 400) == pytest.approx(2.0 * FULL.predict_s(1, 400), rel=0.01)
    stages = sum(costs.stage_s(stage, OpKind.PREFILL, 1, 400) for stage in range(2))
    assert costs.node_s(OpKind.PREFILL, 1, 400) == pytest.approx(stages, rel=1e-12)


@pytest.mark.parametrize("spread", [0.05, 0.2])
def test_the_interval_becomes_as_wide_as_durations_vary(spread: float) -> None:
    random = Random(4)
    costs = NodeCosts(NodeLatency(({OpKind.PREFILL: FULL},)))
    inside = 0
    for index in range(4000):
        length = float(random.choice((64, 256, 1024)))
        low_s, high_s = costs.interval_s(0, OpKind.PREFILL, 1, length)
        real_s = FULL.predict_s(1, length) * math.exp(random.gauss(0.0, spread))
        inside += index >= 1000 and low_s <= real_s <= high_s
        costs.calibrate(0, OpKind.PREFILL, 1, length, real_s)
    assert 0.86 <= inside / 3000 <= 0.94


def test_the_interval_begins_with_that_of_the_profile() -> None:
    model = LatencyModel("constant", (0.1,), residual_p5=-0.3, residual_p95=0.5)
    costs = NodeCosts(NodeLatency(({OpKind.DECODE: model},)))
    assert costs.interval_s(0, OpKind.DECODE, 1, 1) == pytest.approx((0.07, 0.15))
    assert costs.interval_s(0, OpKind.PREFILL, 1, 1) == (0.0, 0.0)


def test_records_tell_errors_with_and_without_the_other_kind_of_work() -> None:
    costs = NodeCosts(NodeLatency(({OpKind.PREFILL: FULL, OpKind.DECODE: FULL},)), drift_band=0.12)
    assert costs.records() == []
    for _ in range(20):
        costs.calibrate(0, OpKind.PREFILL, 1, 100, FULL.predict_s(1, 100))
    (record,) = costs.records()
    assert (record.stage, record.op, record.num_seen, record.error_beside) == (0, OpKind.PREFILL, 20, None)
    assert record.error == pytest.approx(0.0, abs=1e-9)
    assert record.ratio == pytest.approx(1.0)
    costs.calibrate(0, OpKind.PREFILL, 1, 100, 1.25 * FULL.predict_s(1, 100), beside=True)
    (record,) = costs.records()
    assert record.num_seen == 21
    assert record.error_beside == pytest.approx(0.2), "|predicted - real| / real"


@given(
    model=st.sampled_from([LatencyModel("quadratic", (7e-7,)), LatencyModel("constant", (0.01,))]),
    operations=st.lists(
        st.tuples(st.integers(1, 64), st.integers(1, 4096), st.integers(0, 4096), st.floats(0.001, 1000.0)), min_size=1
    ),
)
def test_a_single_coefficient_is_estimated_to_the_last_digit_like_one_of_several(
    model: LatencyModel, operations: list[tuple[int, int, int, float]]
) -> None:
    single, general = coefficients_of(model), Coefficients(model)
    assert type(single) is SingleCoefficient
    for batch, length, cached, factor in operations:
        real_s = factor * single.profiled_s(batch, length, cached)
        assert learn(single, batch, length, real_s, cached) == learn(general, batch, length, real_s, cached)
        assert (single.terms, single.ratio) == (general.terms, general.ratio)
