"""Figures, capacity and claims from runs that are given."""

import math
from dataclasses import replace

import pytest

from bench.colocation.__main__ import main, parse
from bench.colocation.capacity import find_capacity
from bench.colocation.claims import claims, line
from bench.colocation.config import ColocationConfig, ColocationError
from bench.colocation.figures import colocated, harvest_of_most_idle
from bench.colocation.measure import Measured, pooled
from bench.colocation.probes import most_attained
from bench.colocation.scenario import Run, rows, run_of

OFF = Measured(
    seconds=100.0,
    num_requests=1000,
    num_kept=990,
    num_rejected=0,
    ttft_p50_s=0.1,
    ttft_p99_s=0.3,
    tpot_p50_s=0.02,
    tpot_p99_s=0.04,
    stage_s=800.0,
    serving_s=300.0,
    training_s=0.0,
    trained_tokens=0,
    trained_work_s=0.0,
    staleness_p50_s=None,
    staleness_p99_s=None,
)
ON = replace(OFF, num_kept=980, trained_tokens=50_000, trained_work_s=400.0, training_s=420.0, staleness_p50_s=0.5)


def test_harvest_is_trained_work_over_the_idle_time_of_serving_alone():
    row = colocated([ON, ON], [OFF, OFF], most_trained_per_s=1000.0)
    assert row["harvest"] == pytest.approx(400.0 / 500.0)
    assert row["attainment_kept"] == pytest.approx(980 / 990)
    assert row["safe_harvest"] == pytest.approx(0.8 * 980 / 990)
    assert row["training_kept"] == pytest.approx(0.5)
    assert row["staleness_s"] == {"p50": 0.5, "p99": None}


def test_better_attainment_than_without_training_counts_as_kept_and_no_more():
    row = colocated([replace(ON, num_kept=1000)], [OFF], most_trained_per_s=1000.0)
    assert row["attainment_kept"] == 1.0


def test_nothing_is_safe_where_serving_alone_is_overload():
    row = colocated([ON], [replace(OFF, num_kept=940)], most_trained_per_s=1000.0)
    assert row["attainment_kept"] is None
    assert row["safe_harvest"] == 0.0


def test_a_latency_that_one_run_never_reached_is_no_mean():
    assert pooled([1.0, 3.0, None]) == 2.0
    assert pooled([1.0, math.inf]) is None
    assert pooled([None]) is None


@pytest.mark.parametrize("limit", [0.3, 1.0, 7.3, 30.0])
def test_capacity_is_the_highest_rate_that_is_served(limit):
    found = find_capacity(
        lambda rate: 1.0 if rate <= 1.3 * limit else 0.5, lambda rate: float(rate <= limit), 0.99, 0.03
    )
    assert 0.97 * limit <= found.rate <= limit
    assert all((attained >= 0.99) == (rate <= limit) for rate, attained in found.probes)


def test_a_dip_at_a_low_rate_does_not_hide_a_capacity():
    def attained(rate: float) -> float:
        return 0.5 if rate > 20.0 else 0.98 if 4.0 < rate < 12.0 else 1.0

    assert 0.97 * 20.0 <= find_capacity(attained, attained, 0.99, 0.03).rate <= 20.0


def test_a_cluster_that_serves_nothing_has_no_capacity():
    assert find_capacity(lambda rate: 0.5, lambda rate: 0.5, 0.99, 0.03).rate == 0.0


def test_a_rate_that_cannot_be_served_any_more_costs_no_further_runs():
    runs = [run_of(ColocationConfig(seconds=20.0), "lemix", 5.0, seed, trains=False) for seed in range(3)]
    num_requests = sum(len(rows(run)) for run in runs)
    simulated = []

    def missing(*missed: int) -> float:
        simulated.clear()

        def simulate(run: Run) -> Measured:
            simulated.append(run.seed)
            return replace(OFF, num_requests=len(rows(run)), num_kept=len(rows(run)) - missed[run.seed])

        return most_attained(runs, 0.99, simulate)

    assert missing(0, 1, 0) == (num_requests - 1) / num_requests
    assert simulated == [0, 1, 2]
    assert missing(1, num_requests // 50, 5) < 0.99
    assert simulated == [0, 1]


def test_harvest_of_the_most_idle_does_not_reward_who_serves_less():
    lazy = replace(OFF, serving_s=200.0)
    assert harvest_of_most_idle([ON], [[OFF], [lazy]]) == pytest.approx(400.0 / 600.0)
    assert harvest_of_most_idle([ON, ON], [[OFF, OFF]]) == pytest.approx(400.0 / 500.0)


def _row(policy, on, off, safe):
    return {"share": 0.5, "policy": policy, "slo_attainment": on, "slo_attainment_off": off, "safe_harvest": safe}


def test_claims_compare_with_the_best_policy_and_the_best_baseline():
    found = {
        "rates": [_row("lemix", 0.985, 0.99, 0.85), _row("separate", 0.97, 0.999, 0.5)],
        "heterogeneous": {"per_node": 0.98, "averaged": 0.90, "gains": [0.07, 0.09]},
    }
    verdicts = {claim["name"]: (claim["value"], claim["verdict"]) for claim in claims(found)}
    assert verdicts["safe_harvest"] == (0.85, "held")
    assert verdicts["safe_harvest_goal"] == (0.85, "missed")
    assert verdicts["attainment_lost"] == (pytest.approx(1.4), "missed")
    assert verdicts["over_baselines"] == (pytest.approx(1.7), "held")
    assert verdicts["per_node"] == (pytest.approx(8.0), "held")


def test_a_quick_run_decides_nothing():
    found = {
        "rates": [_row("lemix", 0.99, 0.99, 0.95), _row("separate", 0.5, 0.999, 0.5)],
        "heterogeneous": {"per_node": 0.98, "averaged": 0.90, "gains": [0.07, 0.09]},
    }
    quick = claims(found, is_quick=True)
    assert {(claim["verdict"], claim["reason"]) for claim in quick} == {("unresolved", "a quick run")}
    assert all(line(claim).endswith(", a quick run)") for claim in quick)
    assert [claim["value"] for claim in quick] == [claim["value"] for claim in claims(found)]


def test_profiles_of_different_numbers_of_stages_are_refused(capsys, tmp_path):
    two, four = "deploy/profiles/a100-llama-2-7b.json", "deploy/profiles/a100-llama-2-7b-4-stages.json"
    for arguments in (["--profile", four], ["--fast-profile", four]):
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
        told = capsys.readouterr().err
        assert told.startswith("colocation: --profile ")
        assert told.count("\n") == 1
        assert f"{four} has 4" in told
        assert "has 2" in told
    assert not (tmp_path / "out").exists()
    assert parse(["--profile", two, "--quick"]).is_quick


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"policies": ("separate",)}, "must name lemix"),
        ({"policies": ("lemix", "nonsense")}, "unknown policy 'nonsense'"),
        ({"nodes": 1}, "--nodes must be at least 2"),
        ({"seeds": ()}, "--seeds names no seed"),
        ({"seconds": 0.0}, "--seconds must be positive"),
    ],
)
def test_options_that_make_no_sense_are_named(changes, reason):
    with pytest.raises(ColocationError, match=reason):
        ColocationConfig(**changes)


def test_a_live_run_is_judged_by_itself_and_by_its_clock():
    mine = {"slo_attainment": 0.97, "slo_attainment_off": 0.99, "safe_harvest": 0.82}
    live = {"policies": {"lemix": {"live": mine}}, "clock_slip_p99_frac": 0.015, "time_scale": 4.0}
    found = {"rates": [], "heterogeneous": {"per_node": 1.0, "averaged": 0.95, "gains": [0.0, 0.1]}, "live": live}
    verdicts = {claim["name"]: claim["verdict"] for claim in claims(found)}
    assert verdicts["live_safe_harvest"] == "held"
    assert verdicts["live_attainment_lost"] == "missed"
    assert verdicts["clock_slip"] == "held"
    assert verdicts["time_scale"] == "held"
    late = claims({**found, "live": {**live, "clock_slip_p99_frac": 0.05}})
    assert {claim["name"]: claim["verdict"] for claim in late}["clock_slip"] == "missed"
    # A scale that does not keep time is no answer.
    assert "time_scale" not in [claim["name"] for claim in late]
    assert verdicts["per_node"] == "unresolved"
    assert verdicts["safe_harvest"] == "unresolved"
