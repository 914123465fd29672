"""The comparison with separate clusters and the verdicts, on rows made by hand."""

import pytest

from bench.paper.claims import CLAIMS, limit, shown, verdicts
from bench.paper.compare import against_baseline, overloaded_points


def _row(policy, rate=4.0, seed=0, **changes):
    return {
        "policy": policy, "rate": rate, "training_share": 0.5, "mean_forward_s": 0.06, "seed": seed,
        "tasks_per_held_node_s": 1.0, "slo_attainment": 0.9, "efficiency": 0.5, "makespan_s": 100.0,
        "worst_response_slos": 2.0, "n_requests": 100,
    } | changes  # fmt: skip


def _medians(*rows):
    return against_baseline(rows)[0]


def test_ratios_are_point_by_point():
    lemix = _medians(
        _row("separate"),
        _row("separate", 8.0, tasks_per_held_node_s=2.0),
        _row("lemix", tasks_per_held_node_s=4.0, makespan_s=150.0),
        _row("lemix", 8.0, tasks_per_held_node_s=2.0, slo_attainment=0.85),
    )["lemix"]
    assert lemix["throughput_ratio"] == {"geomean": pytest.approx(2.0), "max": 4.0, "min": 1.0}
    assert lemix["attainment_points"]["worst"] == pytest.approx(-5.0)
    assert lemix["makespan_ratio"]["max"] == 1.5
    assert (lemix["points"], lemix["excluded"]) == (2, 0)


def test_points_that_overload_everybody_are_left_out_of_the_smallest_and_reported():
    rows = [
        _row("separate"),
        _row("separate", 32.0, slo_attainment=0.2),
        _row("lemix", tasks_per_held_node_s=1.5),
        _row("lemix", 32.0, slo_attainment=0.1, tasks_per_held_node_s=0.5),
    ]
    lemix = _medians(*rows)["lemix"]
    assert lemix["throughput_ratio"]["min"] == 1.5
    assert lemix["attainment_ratio"] == {"max": 1.0, "min": 1.0}
    assert lemix["attainment_points"]["worst"] == pytest.approx(-10.0)
    assert lemix["excluded"] == 1
    (point,) = overloaded_points(rows)
    assert point["rate"] == 32.0
    assert point["slo_attainment"] == {"separate": 0.2, "lemix": 0.1}
    assert point["throughput_ratio"]["lemix"] == 0.5


def test_a_point_that_one_policy_can_serve_counts():
    rows = [_row("separate", slo_attainment=0.2), _row("lemix", slo_attainment=0.6, tasks_per_held_node_s=0.5)]
    lemix = _medians(*rows)["lemix"]
    assert lemix["throughput_ratio"]["min"] == 0.5
    assert lemix["attainment_ratio"]["max"] == pytest.approx(3.0)
    assert overloaded_points(rows) == []


def test_a_ratio_of_attainments_needs_a_baseline_that_means_something():
    lemix = _medians(_row("separate", slo_attainment=0.05), _row("lemix"))["lemix"]
    assert lemix["attainment_ratio"] == {"max": None, "min": None}


def test_worst_responses_count_where_separate_clusters_are_not_overloaded():
    rows = (
        _row("separate"),
        _row("separate", 8.0, slo_attainment=0.3),
        _row("lemix", worst_response_slos=4.0),
        _row("lemix", 8.0, worst_response_slos=50.0),
    )
    assert _medians(*rows)["lemix"]["worst_response_slos"] == 4.0
    unanswered = _medians(_row("separate"), _row("lemix", worst_response_slos=None))
    assert unanswered["lemix"]["worst_response_slos"] is None


def test_an_attainment_of_zero_counts_as_one_request():
    figures = _medians(_row("separate", slo_attainment=0.0, tasks_per_held_node_s=2.0))
    assert figures["separate"]["attainment_weighted"] == pytest.approx(0.02)


def test_unfinished_runs_have_no_efficiency():
    assert _medians(_row("separate", efficiency=None))["separate"]["efficiency"] is None


def test_medians_and_spread_over_the_seeds():
    rows = [_row("separate", seed=seed) for seed in range(3)]
    rows += [_row("lemix", seed=seed, tasks_per_held_node_s=1.0 + seed) for seed in range(3)]
    medians, extents, repetitions = against_baseline(rows)
    assert medians["lemix"]["throughput_ratio"]["geomean"] == pytest.approx(2.0)
    assert extents["lemix"]["throughput_ratio"]["geomean"] == pytest.approx([1.0, 3.0])
    assert len(repetitions["lemix"]) == 3


def _claims(*changes):
    """Verdicts by name for one seed per item of `changes` of LeMix."""
    rows = [_row(name, seed=seed) for seed in range(len(changes)) for name in ("separate", "round_robin")]
    rows += [_row("lemix", seed=seed, **change) for seed, change in enumerate(changes)]
    return {claim["name"]: claim for claim in verdicts(against_baseline(rows)[2])}


def test_verdicts():
    good = {"tasks_per_held_node_s": 2.5}
    assert _claims(good, good)["throughput"]["verdict"] == "held"
    assert _claims({}, {})["throughput"]["verdict"] == "missed"
    assert _claims(good, {})["throughput"]["verdict"] == "unresolved"
    assert _claims({"makespan_s": 170.0})["makespan"]["verdict"] == "missed"
    assert _claims({"slo_attainment": 0.879})["attainment_worst"]["verdict"] == "missed"
    assert _claims({"efficiency": None})["efficiency"]["verdict"] == "unresolved"


def test_the_best_of_the_others_is_what_counts():
    claim = _claims({"tasks_per_held_node_s": 3.0})["attainment_weighted"]
    assert claim["values"] == [pytest.approx(3.0)]
    assert claim["verdict"] == "held"


def test_without_lemix_or_anybody_else_there_is_nothing_to_claim():
    assert verdicts(against_baseline([_row("separate")])[2]) == []
    assert verdicts({"lemix": []}) == []


def test_values_as_text():
    claim = _claims({})["attainment_worst"]
    assert shown(claim, -1.25) == "-1.2 points"
    assert shown(claim, -1.25, unit=False) == "-1.2"
    assert shown(claim, None) == "–"
    assert limit(claim) == "at least -2.0 points"
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
