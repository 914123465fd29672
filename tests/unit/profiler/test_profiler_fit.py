"""Fitting: known coefficients are recovered, the true form wins, nonsense is refused."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.latency import FORMS, MOVES, TABULATED, LatencyModel, OpKind
from services.profiler.fit import CANDIDATES, FitError, Timing, fit_all, fit_op

GRID = [(batch, length) for batch in (1, 2, 4, 8) for length in (16, 48, 128, 256, 512)]


def timings(form, coefficients, *, noise=0.0, seed=0, repetitions=5, grid=GRID):
    random = np.random.default_rng(seed)
    points = []
    for batch, length in grid:
        exact = sum(c * f for c, f in zip(coefficients, FORMS[form](batch, length), strict=True))
        factors = 1.0 + noise * random.uniform(-1.0, 1.0, repetitions)
        points.append(Timing(batch, length, tuple(float(exact * factor) for factor in factors)))
    return points


def chosen(fits):
    (best,) = [fit for fit in fits if fit.chosen]
    return best


def fit_of(fits, form):
    return next(fit for fit in fits if fit.form == form)


@given(
    intercept=st.floats(1e-4, 5e-3),
    per_token=st.floats(1e-6, 1e-4),
    seed=st.integers(0, 1000),
    noise=st.floats(0, 0.05),
)
@settings(max_examples=40, deadline=None)
def test_affine_coefficients_are_recovered_under_noise(intercept, per_token, seed, noise):
    fits = fit_op(0, OpKind.PREFILL, timings("affine", (intercept, per_token), noise=noise, seed=seed))
    fit = fit_of(fits, "affine")
    model = LatencyModel(fit.form, fit.coefficients)
    for batch, length in GRID:
        truth = intercept + per_token * batch * length
        assert model.predict_s(batch, length) == pytest.approx(truth, rel=0.06)
    assert fit.mape <= 0.07


@given(eta=st.floats(1e-9, 1e-4), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_the_quadratic_coefficient_is_recovered_under_noise(eta, seed):
    fits = fit_op(0, OpKind.TRAIN_BACKWARD, timings("quadratic", (eta,), noise=0.05, seed=seed))
    assert fit_of(fits, "quadratic").coefficients[0] == pytest.approx(eta, rel=0.03)


@pytest.mark.parametrize(
    ("op", "form", "coefficients"),
    [
        (OpKind.PREFILL, "quadratic", (3e-8,)),
        (OpKind.PREFILL, "affine", (1e-3, 2e-5)),
        (OpKind.PREFILL, "full", (1e-3, 1e-5, 1e-7)),
        (OpKind.TRAIN_FORWARD, "affine", (2e-3, 3e-5)),
        (OpKind.TRAIN_BACKWARD, "full", (1e-3, 2e-5, 2e-7)),
        (OpKind.DECODE, "affine", (2e-3, 1e-6)),
        (OpKind.DECODE, "full_decode", (1e-3, 8e-4, 1e-6)),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_the_true_form_is_chosen(op, form, coefficients, seed):
    best = chosen(fit_op(0, op, timings(form, coefficients, noise=0.03, seed=seed)))
    assert best.form == form
    assert best.mape < 0.03
    assert best.r2 > 0.98


@given(
    durations=st.lists(st.floats(1e-6, 10.0), min_size=len(GRID), max_size=len(GRID)),
    op=st.sampled_from([OpKind.PREFILL, OpKind.DECODE, OpKind.TRAIN_BACKWARD]),
)
@settings(max_examples=60, deadline=None)
def test_whatever_was_measured_no_prediction_is_negative(durations, op):
    points = [Timing(b, n, (duration,)) for (b, n), duration in zip(GRID, durations, strict=True)]
    fits = fit_op(0, op, points)
    assert sum(fit.chosen for fit in fits) == 1
    for fit in fits:
        assert all(value >= 0.0 and math.isfinite(value) for value in fit.coefficients)
        assert fit.mape >= 0.0
        assert fit.r2 <= 1.0
        assert fit.residual_p5 <= fit.residual_p95
        assert fit.model.predict_s(64, 4096) >= 0.0


def test_exact_data_prefers_the_simpler_of_equal_forms():
    best = chosen(fit_op(0, OpKind.PREFILL, timings("affine", (1e-3, 1e-5))))
    assert best.form == "affine"
    assert best.mape < 1e-9


def test_a_constant_is_the_middle_of_its_repetitions_and_its_error_comes_from_them():
    (fit,) = fit_op(1, OpKind.OPTIMIZER_STEP, [Timing(1, 1, (0.9e-3, 1.0e-3, 1.1e-3))])
    assert fit.chosen
    assert fit.form == "constant"
    assert fit.coefficients[0] == pytest.approx(1.0e-3, rel=0.02)
    assert 0.05 < fit.mape < 0.2


def test_the_median_ignores_a_hiccup():
    points = [Timing(batch, length, (1e-3 + 1e-5 * batch * length,) * 4 + (1.0,)) for batch, length in GRID]
    fit = fit_of(fit_op(0, OpKind.PREFILL, points), "affine")
    assert fit.coefficients == pytest.approx((1e-3, 1e-5), rel=1e-6)


def test_the_interval_covers_nine_of_ten_new_measurements():
    form, coefficients = "affine", (1e-3, 2e-5)
    fit = fit_of(fit_op(0, OpKind.PREFILL, timings(form, coefficients, noise=0.2, seed=1, repetitions=20)), form)
    model = LatencyModel(fit.form, fit.coefficients)
    fresh = timings(form, coefficients, noise=0.2, seed=2, repetitions=20)
    inside = [
        fit.residual_p5 <= duration / model.predict_s(point.batch, point.length) - 1.0 <= fit.residual_p95
        for point in fresh
        for duration in point.durations_s
    ]
    assert 0.85 < np.mean(inside) < 0.95


def test_points_measured_twice_are_merged():
    once = timings("affine", (1e-3, 2e-5), noise=0.05, seed=3)
    split = [Timing(p.batch, p.length, (d,)) for p in once for d in p.durations_s]
    assert fit_op(0, OpKind.PREFILL, split) == fit_op(0, OpKind.PREFILL, once)


def test_more_points_than_folds():
    grid = [(batch, length) for batch in (1, 2, 3, 4, 5) for length in (8, 16, 32, 64, 128, 256, 512)]
    best = chosen(fit_op(0, OpKind.PREFILL, timings("full", (1e-3, 1e-5, 1e-7), noise=0.02, grid=grid)))
    assert best.form == "full"


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([Timing(1, 16, (1e-3, 1e-3))], "1 different point"),
        ([Timing(1, 16, (1e-3,)), Timing(1, 16, (1e-3,)), Timing(1, 16, (2e-3,))], "1 different point"),
        ([Timing(1, 16, ())], "no duration"),
        ([Timing(1, 16, (0.0,))], "not a positive number"),
        ([Timing(1, 16, (math.nan,))], "not a positive number"),
        ([Timing(0, 16, (1e-3,))], "at least 1"),
        ([], "0 different point"),
    ],
)
def test_degenerate_points_are_refused_by_name(points, message):
    with pytest.raises(FitError, match=message) as raised:
        fit_op(2, OpKind.PREFILL, points)
    assert str(raised.value).startswith("stage 2, prefill: ")


def test_a_form_the_points_say_nothing_about_is_left_out():
    one_at_a_time = [(1, length) for length in (16, 64, 256, 512)]
    fits = fit_op(0, OpKind.DECODE, timings("affine", (1e-3, 1e-6), grid=one_at_a_time))
    assert [fit.form for fit in fits] == ["quadratic", "affine", "tabulated"]
    assert chosen(fits).form == "affine"


def test_a_constant_needs_two_repetitions():
    with pytest.raises(FitError, match="1 different point"):
        fit_op(0, OpKind.WEIGHT_SYNC, [Timing(1, 1, (1e-3,))])


def test_every_stage_and_operation_gets_one_chosen_form():
    data = {
        (stage, op): timings("affine", (1e-3, 1e-5), noise=0.01, seed=stage)
        for stage in range(2)
        for op in (OpKind.PREFILL, OpKind.DECODE)
    }
    fits = fit_all(data)
    assert [(f.stage, f.op) for f in fits if f.chosen] == sorted(data)
    assert len(fits) == sum(len(CANDIDATES[op]) for _, op in data)


def test_every_candidate_is_a_form_the_scheduler_knows():
    assert {form for forms in CANDIDATES.values() for form in forms} <= {*FORMS, TABULATED}
    assert set(CANDIDATES) == set(OpKind) - MOVES
