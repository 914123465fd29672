"""Running statistics of constant size."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.core.estimator import Arrivals, OutputLengths, RunningMoments
from services.scheduler.core.tasks import InferenceTask


def _asking(max_tokens: int, *, fixed: bool = False) -> InferenceTask:
    return InferenceTask("r", 0.0, 1, max_tokens, fixed_output=fixed)


def test_output_length_starts_configured_and_follows_what_ended() -> None:
    outputs = OutputLengths(64)
    asking = _asking(1000)
    assert outputs.expected_tokens(asking) == 64
    for _ in range(OutputLengths.ENOUGH - 1):
        outputs.observe(asking, 10)
    assert outputs.expected_tokens(asking) == 64
    outputs.observe(asking, 10)
    assert outputs.expected_tokens(asking) == 10
    assert outputs.expected_tokens(_asking(4)) == 4


def test_output_length_forgets_what_left_the_window() -> None:
    outputs = OutputLengths(64)
    asking = _asking(10_000)
    for _ in range(OutputLengths.WINDOW):
        outputs.observe(asking, 1000)
    for _ in range(OutputLengths.WINDOW):
        outputs.observe(asking, 20)
    assert outputs.expected_tokens(asking) == 20


def test_a_fixed_output_is_expected_as_it_is_and_tells_nothing_of_others() -> None:
    outputs = OutputLengths(64)
    assert outputs.expected_tokens(_asking(500, fixed=True)) == 500
    for _ in range(OutputLengths.ENOUGH):
        outputs.observe(_asking(500, fixed=True), 500)
    assert outputs.expected_tokens(_asking(1000)) == 64
    assert outputs.mean_tokens == 500


@given(st.lists(st.integers(1, 4096), min_size=2, max_size=50))
def test_moments_equal_the_batch_formulas(values: list[int]) -> None:
    moments = RunningMoments()
    for value in values:
        moments.observe(value)
    assert moments.mean == pytest.approx(statistics.fmean(values))
    assert moments.std == pytest.approx(statistics.stdev(values), abs=1e-6)


def test_length_consistency_is_dimensionless() -> None:
    moments = RunningMoments()
    assert moments.consistency(10) == 0.0
    for value in (90, 100, 110):
        moments.observe(value)
    assert moments.consistency(100) == 1.0
    assert moments.consistency(110) == pytest.approx(math.exp(-0.5))
    scaled = RunningMoments()
    for value in (900, 1000, 1100):
        scaled.observe(value)
    assert scaled.consistency(1100) == pytest.approx(moments.consistency(110))


def test_length_consistency_is_zero_without_spread() -> None:
    moments = RunningMoments()
    moments.observe(5)
    moments.observe(5)
    assert moments.consistency(5) == 0.0


def test_arrival_gap_is_unknown_then_follows_and_grows_in_silence() -> None:
    arrivals = Arrivals()
    arrivals.observe(1.0)
    assert arrivals.gap_s(1.0) == math.inf
    arrivals.observe(1.5)
    assert arrivals.gap_s(1.5) == 0.5
    assert arrivals.gap_s(11.5) == 10.0
