"""Errors of predictions."""

import random

import pytest

from bench.fidelity import accuracy, ops
from bench.fidelity.trace import trace_of
from tests.unit.fidelity import runs


def _samples(**kwargs):
    config, steps = runs.steps_of(**kwargs)
    return ops.samples(config, runs.recorded(steps))


def test_a_profile_that_is_right_has_no_error():
    figures = accuracy.of_ops(_samples(trains=True))
    assert set(figures["kinds"]) == {"prefill", "decode", "train_forward", "train_backward", "optimizer_step"}
    assert figures["profile_mape"] == pytest.approx(0.0, abs=1e-9)
    assert figures["online_mape"] == pytest.approx(0.0, abs=1e-9)
    assert figures["noise_floor"] == pytest.approx(0.0, abs=1e-4)


def test_calibration_learns_what_the_profile_does_not_know():
    samples = _samples(slower=1.5, trains=True)
    whole = accuracy.of_ops(samples)
    late = accuracy.of_ops(samples[-len(samples) // 4 :])
    assert whole["profile_mape"] == pytest.approx(1.0 / 3.0, abs=1e-6)
    assert whole["kinds"]["prefill"]["profile_bias"] == pytest.approx(0.5)
    assert late["kinds"]["decode"]["online_mape"] < 0.05
    assert whole["kinds"]["prefill"]["profile_coverage"] == 0.0


def test_pieces_of_training_operations_are_predicted_as_pieces():
    samples = _samples(trains=True)
    assert all(sample.profile_s == pytest.approx(sample.measured_s) for sample in samples)


def test_the_noise_floor_is_the_spread_of_repetitions():
    rng = random.Random(0)
    samples = [
        sample._replace(measured_s=sample.measured_s * rng.uniform(0.8, 1.2))
        for sample in _samples()
        if sample.kind == "prefill"
    ]
    # Five sizes, eight repetitions each: the mean distance of uniform noise of 20 % is 10 %.
    assert accuracy.noise_floor(samples) == pytest.approx(0.1, abs=0.05)
    assert accuracy.noise_floor(samples[:5]) is None


def test_short_operations_are_left_out():
    short = [sample._replace(profile_s=0.004) for sample in _samples()]
    assert accuracy.of_ops(short)["kinds"] == {}
    assert accuracy.of_ops(short)["online_mape"] is None


def test_what_ran_beside_is_told():
    found = accuracy.by_company(_samples(trains=True))
    assert "decode beside prefill" in found
    assert "train_backward beside alone" in found
    assert all(entry["measured_over_profile"] == pytest.approx(1.0) for entry in found.values())


def test_responses_are_compared_with_what_was_predicted():
    config, steps = runs.steps_of()
    trace = trace_of(config, steps)
    found = accuracy.of_responses(trace, 0.0)
    assert found["requests"] + found["with_later_arrivals"]["requests"] == 40
    assert found["mape"] < 0.02
    trace.requests["r0"].predicted_s *= 2.0
    assert accuracy.of_responses(trace, 0.0)["mape"] > found["mape"]
    assert accuracy.of_responses(trace, 1000.0)["mape"] is None


def test_a_request_after_which_another_came_is_counted_apart():
    config, steps = runs.steps_of(work=[runs.requests(1)[0], *_at_once()])
    found = accuracy.of_responses(trace_of(config, steps), 0.0)
    assert found["with_later_arrivals"]["requests"] == 1
    assert found["requests"] == 2


def _at_once():
    """The second request comes while the first one's prefill runs, the third long after."""
    first, second = runs.requests(2)
    return [
        type(first)("r1", first.arrival_s + 0.01, 100, 2, 16, runs.SLO),
        type(second)("r2", first.arrival_s + 10.0, 100, 2, 16, runs.SLO),
    ]
