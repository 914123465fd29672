"""90 % intervals cover nine of ten new measurements, at sizes between those of the grid, over many seeds."""

import numpy as np
import pytest

from services.latency import OpKind
from services.profiler.fit import Timing, fit_op
from services.profiler.outliers import without_outliers
from services.profiler.residuals import held_out, interval

GRID = [(batch, length) for batch in (1, 2, 4, 8) for length in (16, 64, 128, 256, 512) if batch * length <= 2048]
SEEDS = range(16)


def smooth_s(batch, length):
    return 1e-3 + 1e-5 * batch * length + 2e-9 * batch * length * length


def kinked_s(batch, length):
    """Bound by memory, then by arithmetic: no form but a table follows it."""
    return max(2e-3, 2e-5 * batch * length)


def coverage(truth, *, noise, repetitions, hiccups, seed):
    random = np.random.default_rng(seed)

    def draw(batch, length, count):
        factors = np.exp(noise * random.standard_normal(count)) * np.where(random.random(count) < hiccups, 3.0, 1.0)
        return tuple(float(value) for value in truth(batch, length) * factors)

    points = without_outliers([draw(batch, length, repetitions) for batch, length in GRID])
    timings = [Timing(batch, length, kept) for (batch, length), kept in zip(GRID, points, strict=True)]
    (model,) = [fit.model for fit in fit_op(0, OpKind.PREFILL, timings) if fit.chosen]
    inside = []
    for _ in range(300):
        batch = int(random.integers(1, 9))
        length = int(np.exp(random.uniform(np.log(16), np.log(min(512, 2048 / batch)))))
        low, high = model.interval_s(batch, length)
        inside.append(low <= draw(batch, length, 1)[0] <= high)
    return float(np.mean(inside))


@pytest.mark.parametrize("truth", [smooth_s, kinked_s])
@pytest.mark.parametrize(("noise", "repetitions"), [(0.02, 10), (0.05, 5), (0.15, 5)])
@pytest.mark.parametrize("hiccups", [0.0, 0.02])
def test_intervals_cover_nine_of_ten_new_measurements(truth, noise, repetitions, hiccups):
    covered = [coverage(truth, noise=noise, repetitions=repetitions, hiccups=hiccups, seed=seed) for seed in SEEDS]
    assert 0.85 <= np.mean(covered) <= 0.95
    assert min(covered) >= 0.7


def test_few_residuals_give_all_of_them_and_many_their_quantiles():
    assert interval([0.1, -0.2, 0.3]) == (-0.2, 0.3)
    low, high = interval([index / 1000 for index in range(1001)])
    assert (low, high) == (pytest.approx(0.05, abs=2e-3), pytest.approx(0.95, abs=2e-3))


def test_a_prediction_of_nothing_counts_as_the_largest_error():
    error = held_out(np.array([0.0, 1.0]), [(1.0,), (1.2,)])
    assert error.residual_p95 == pytest.approx(0.2)
    assert error.mape == pytest.approx((1.0 + 0.2 / 1.2) / 2.0)
