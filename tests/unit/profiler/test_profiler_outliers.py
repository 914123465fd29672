"""Which repetitions are left out."""

import numpy as np
import pytest

from services.profiler.outliers import without_outliers


@pytest.mark.parametrize("seed", range(5))
def test_hiccups_are_left_out_and_little_else(seed):
    random = np.random.default_rng(seed)
    points = [list(0.01 * np.exp(0.05 * random.standard_normal(5))) for _ in range(40)]
    for point in points[::8]:
        point[2] *= 3.0
    kept = without_outliers(points)
    assert all(len(after) == 4 for after in kept[::8])
    assert sum(len(before) - len(after) for before, after in zip(points, kept, strict=True)) <= 5 + 2


def test_a_noisy_operation_keeps_what_a_steady_one_loses():
    steady, noisy = [1.0, 1.0, 1.0, 1.1], [1.0, 0.8, 1.2, 1.1]
    assert without_outliers([steady] * 5)[0] == (1.0, 1.0, 1.0)
    assert without_outliers([noisy] * 4 + [steady])[4] == tuple(steady)


@pytest.mark.parametrize(
    "durations",
    [
        [1.0, 1.0, 9.0],  # three say nothing about which is odd
        [1.0, 1.0, 1.0, 1.0, 9.0, 9.0],  # two speeds
        [1.0, 1.0, 1.0, 1.001],  # a step of the clock
        [2.0],
    ],
)
def test_what_is_no_accident_stays(durations):
    assert without_outliers([durations]) == [tuple(durations)]
