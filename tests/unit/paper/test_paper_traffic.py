"""When the tasks of a run arrive."""

import statistics
from itertools import islice, pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.simulator.arrivals import DAY_S, daily, poisson


def _daily(num, rate, seed=0, **shape):
    return list(islice(daily(Random(seed), rate, **shape), num))


def test_without_a_day_and_clumps_arrivals_are_poisson():
    assert _daily(50, 4.0, swing=0.0, cv=1.0) == list(islice(poisson(Random(0), 4.0), 50))


@given(st.floats(0.0, 1.0), st.floats(0.3, 5.0), st.integers(0, 1000))
def test_arrivals_rise(swing, cv, seed):
    times = _daily(40, 0.01, seed, swing=swing, cv=cv)
    assert all(before <= after for before, after in pairwise(times))


def test_more_arrive_by_day_and_as_many_as_the_mean_rate_says():
    days, rate = 4, 0.05
    times = [at_s for at_s in _daily(40_000, rate, swing=0.8, cv=1.0) if at_s < days * DAY_S]
    assert len(times) == pytest.approx(rate * days * DAY_S, rel=0.03)
    by_day = sum(at_s % DAY_S < DAY_S / 2 for at_s in times) / len(times)
    # Half of 1 + 0.8 * 2 / pi.
    assert by_day == pytest.approx(0.755, abs=0.015)


def test_a_larger_coefficient_of_variation_makes_clumps():
    def spread(cv):
        gaps = [after - before for before, after in pairwise(_daily(5000, 1.0, swing=0.0, cv=cv))]
        return statistics.stdev(gaps) / statistics.mean(gaps)

    assert spread(1.0) == pytest.approx(1.0, rel=0.1)
    assert spread(4.0) == pytest.approx(4.0, rel=0.2)
