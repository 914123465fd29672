"""Repetitions: medians, spreads and honest verdicts."""

import pytest

from bench.demo.verdict import CLAIMS, verdicts
from bench.report.verdict import combine, spread


def _metrics(attainment=0.9, throughput=10.0, loss=2.0, trained=100.0):
    return {
        "slo_attainment": attainment,
        "tasks_per_held_node_s": throughput,
        "inference_loss": {"after_drift": loss},
        "trained_tokens_per_s": trained,
    }


def _by_name(repetitions):
    return {claim["name"]: claim for claim in verdicts(repetitions)}


def test_medians_key_by_key():
    combined = combine([{"a": {"p50": 1.0}, "n": 3}, {"a": {"p50": 5.0}, "n": 4}, {"a": {"p50": 2.0}, "n": 9}])
    assert combined == {"a": {"p50": 2.0}, "n": 4}
    assert isinstance(combined["n"], int)


def test_missing_values_do_not_count():
    assert combine([{"a": None}, {"a": 2.0}]) == {"a": 2.0}
    assert combine([{"a": None}]) == {"a": None}


def test_a_key_of_one_repetition_only_is_kept():
    assert combine([{"steps": {"x": 1}}, {"steps": {"x": 3, "y": 5}}]) == {"steps": {"x": 2, "y": 5}}


def test_spread_is_smallest_and_largest():
    assert spread([{"a": {"p50": 3.0}, "t": "x"}, {"a": {"p50": 1.0}, "t": "x"}]) == {"a": {"p50": [1.0, 3.0]}}


def test_held_when_every_repetition_agrees():
    claims = _by_name({"lemix": [_metrics(throughput=20.0)] * 2, "separate": [_metrics()] * 2})
    assert claims["throughput"]["verdict"] == "held"
    assert claims["throughput"]["values"] == [2.0, 2.0]
    assert claims["throughput"]["median"] == 2.0


def test_missed_when_every_repetition_disagrees():
    claims = _by_name({"lemix": [_metrics(loss=2.2)], "separate": [_metrics(loss=2.0)]})
    assert claims["loss_after_drift"]["verdict"] == "missed"


def test_unresolved_when_the_spread_spans_the_threshold():
    claims = _by_name(
        {"lemix": [_metrics(trained=120.0), _metrics(trained=140.0)], "separate": [_metrics(), _metrics()]}
    )
    assert claims["training"]["verdict"] == "unresolved"
    assert claims["training"]["reason"] == "the repetitions disagree"


def test_figures_in_doubt_decide_nothing():
    measured = {"lemix": [_metrics(throughput=20.0)], "separate": [_metrics()], "round_robin": [_metrics(0.1)]}
    claims = {claim["name"]: claim for claim in verdicts(measured, {"separate": "other programs used 41 % of the CPU"})}
    assert claims["throughput"]["verdict"] == "unresolved"
    assert claims["throughput"]["reason"] == "other programs used 41 % of the CPU"
    assert (claims["attainment_over_naive"]["verdict"], claims["attainment_over_naive"]["reason"]) == ("held", "")


def test_unresolved_when_nothing_was_measured():
    claims = _by_name({"lemix": [_metrics(loss=None)], "separate": [_metrics()]})
    assert claims["loss_after_drift"]["verdict"] == "unresolved"
    assert claims["loss_after_drift"]["median"] is None
    assert claims["loss_after_drift"]["reason"] == "not measured"


def test_pairs_are_of_the_same_repetition():
    lemix = [_metrics(attainment=0.82), _metrics(attainment=1.0)]
    separate = [_metrics(attainment=0.81), _metrics(attainment=0.99)]
    claim = _by_name({"lemix": lemix, "separate": separate})["attainment"]
    assert claim["values"] == pytest.approx([0.01, 0.01])
    assert claim["verdict"] == "held"


def test_a_baseline_of_zero_gives_no_ratio():
    claims = _by_name({"lemix": [_metrics()], "separate": [_metrics(trained=0.0)]})
    assert claims["training"]["verdict"] == "unresolved"


def test_only_policies_that_ran_are_compared():
    assert verdicts({"separate": [_metrics()]}) == []
    names = {claim["name"] for claim in verdicts({"lemix": [_metrics()], "round_robin": [_metrics()]})}
    assert names == {claim.name for claim in CLAIMS if claim.against == "round_robin"}


@pytest.mark.parametrize(("trained", "verdict"), [(131.0, "unresolved"), (128.0, "unresolved"), (140.0, "held")])
def test_one_repetition_close_to_the_threshold_decides_nothing(trained, verdict):
    claims = _by_name({"lemix": [_metrics(trained=trained)], "separate": [_metrics()]})
    assert claims["training"]["verdict"] == verdict
    assert claims["training"]["reason"] == ("" if verdict == "held" else "one repetition, and within 0.03 of the limit")
