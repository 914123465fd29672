"""What is possible with promises: which bounds are asked for, and what comes of them."""

import math
from dataclasses import replace

import pytest

from bench.paper import limits, limits_report
from bench.paper.limits import KEY, POSSIBLE, PROMISED, Limit
from bench.paper.outcome import row
from bench.paper.pool import rows
from bench.paper.promised import Terms
from bench.paper.scenario import Point, Run

_POINT = Point(8.0, 0.5, 0.06)


def _row(policy, seed=0, **changes):
    return {
        "policy": policy, "rate": 8.0, "training_share": 0.5, "mean_forward_s": 0.06, "seed": seed, "n_tasks": 200,
        "n_requests": 90, "slo_attainment": 0.9, "efficiency": 0.5, "makespan_s": 100.0, "worst_response_slos": 2.0,
        "held_node_s": 80.0, "clairvoyant_node_s": 40.0,
    } | changes  # fmt: skip


def _bound(label, limit_s, seed=0):
    place = {"rate": 8.0, "training_share": 0.5, "mean_forward_s": 0.06}
    return {"label": label, **place, "seed": seed, "limit_node_s": limit_s}


def test_terms_are_what_lemix_reached_and_what_the_claims_demand():
    both = [_row("separate", makespan_s=50.0, slo_attainment=0.8), _row("lemix")]
    run = Run(_POINT, "lemix", 0, 200)
    assert dict(limits.limits(both, (0,))) == {
        PROMISED: Limit(run, Terms(0.6, 81, 100.0, pytest.approx(1.2))),
        POSSIBLE: Limit(run, Terms(0.6, math.ceil(0.78 * 90), 80.0, pytest.approx(12.0))),
    }


def test_nobody_is_held_to_a_worst_response_where_separate_clusters_are_overloaded():
    found = dict(limits.limits([_row("separate", slo_attainment=0.01), _row("lemix")], (0,)))
    assert found[POSSIBLE].terms.worst_response_s == math.inf
    assert found[POSSIBLE].terms.kept == 0


@pytest.mark.parametrize(
    "several",
    [
        [_row("separate")],
        [_row("separate", 1), _row("lemix", 1)],
        [_row("separate"), _row("lemix", efficiency=None)],
    ],
    ids=["without lemix", "another seed", "unfinished"],
)
def test_where_no_bound_is_asked_for(several):
    assert limits.limits(several, (0,)) == []
    assert limits.summarise(several, []) == {}
    assert limits_report.tables({}) == []
    assert limits_report.section({}) == ""


def test_shares_are_of_held_time_and_of_the_least():
    several = [_row("separate"), _row("lemix"), _row("lemix", 1)]
    bounds = [_bound(PROMISED, 60.0), _bound(POSSIBLE, 50.0), _bound(PROMISED, 72.0, 1), _bound(POSSIBLE, 40.0, 1)]
    found = limits.summarise(several, bounds)
    assert found[KEY]["promised_efficiency"] == [pytest.approx(0.75), pytest.approx(0.9)]
    assert found[KEY]["possible_efficiency"] == [pytest.approx(0.8), pytest.approx(1.0)]
    assert found[KEY]["efficiency"] == [pytest.approx(0.5), pytest.approx(0.5)]
    (claim,) = found["claims"]
    assert (claim["verdict"], claim["median"], claim["threshold"]) == ("unresolved", pytest.approx(0.825), 0.8)
    (shown,) = limits_report.tables(found)
    assert [cells[1:] for cells in shown.rows] == [
        ("0.50", "0.50", "0.50"), ("0.82", "0.75", "0.90"), ("0.90", "0.80", "1.00")
    ]  # fmt: skip
    assert "60" in limits_report.section(found)


def test_demands_that_contradict_each_other_leave_no_figure():
    found = limits.summarise([_row("separate"), _row("lemix")], [_bound(PROMISED, 60.0), _bound(POSSIBLE, None)])
    assert found[KEY]["possible_efficiency"] == [None]
    assert limits_report.tables(found)[0].rows[2][1:] == ("–", "–", "–")
    assert limits_report.section(found)


def test_a_limit_is_worked_out_like_a_run_is_simulated():
    run = Run(_POINT, "lemix", 0, 60)
    own, separate = row(run), row(replace(run, policy="separate"))
    jobs = [limit for _, limit in limits.limits([own, separate], (0,))]
    heard = []
    alone = rows(jobs, 1, lambda num_done, job: heard.append((num_done, job)))
    assert heard == list(enumerate(jobs, start=1))
    assert rows([run, *jobs], 2, lambda num_done, job: None) == [own, *alone]
    promised, possible = (found["limit_node_s"] for found in alone)
    assert own["clairvoyant_node_s"] <= promised <= own["held_node_s"]
    assert own["clairvoyant_node_s"] <= possible <= separate["held_node_s"]
    impossible = replace(jobs[0], terms=replace(jobs[0].terms, kept=own["n_requests"] + 1))
    assert impossible.row()["limit_node_s"] is None
