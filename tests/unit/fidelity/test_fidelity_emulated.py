"""Workloads on an emulated cluster, with runs that are made up: how often they run, and what is made of them."""

import asyncio

import pytest

from bench.fidelity import compare, emulated
from bench.fidelity.config import FidelityConfig
from bench.fidelity.workloads import EMULATED


def _figures(attainment, ttft_p95_s=1.0):
    return compare.Figures(100, attainment, 0.5, ttft_p95_s, 0.1, 2000.0, 1800.0, 200.0, 0.0, 0.6)


@pytest.fixture
def run(monkeypatch):
    """Runs a workload whose pairs of live and simulated figures are given; returns the outcome."""
    cluster = emulated.EmulatedCluster(FidelityConfig(), model=None)

    def measured(*pairs):
        left = iter(pairs)

        async def pair(*arguments):
            live, simulated = next(left)
            return emulated._Pair(live, simulated, {"cpu_share": {}}, [f"problem {live.slo_attainment}"])

        monkeypatch.setattr(cluster, "_pair", pair)
        outcome = asyncio.run(cluster.run(EMULATED[0], lambda at_s: None))
        assert not list(left)
        return outcome

    return measured


def test_a_pair_that_agrees_is_enough(run):
    outcome = run((_figures(0.90), _figures(0.89)))
    assert outcome.entry["runs"] == 1
    assert outcome.entry["slo_attainment_points"] == pytest.approx(-1.0)
    assert "live_spread" not in outcome.entry


def test_one_that_does_not_is_made_twice_more_and_medians_are_compared(run):
    outcome = run(
        (_figures(0.90, 1.0), _figures(0.80, 1.2)),
        (_figures(0.84, 1.1), _figures(0.85, 1.1)),
        (_figures(0.86, 1.2), _figures(0.86, 1.0)),
    )
    entry = outcome.entry
    assert entry["runs"] == 3
    assert entry["slo_attainment_points"] == pytest.approx(-1.0)
    assert entry["ttft_p95_pct"] == pytest.approx(0.0)
    # What the first one said stays visible.
    assert entry["first_run"]["slo_attainment_points"] == pytest.approx(-10.0)
    assert entry["live_spread"]["slo_attainment_points"] == pytest.approx(6.0)
    assert entry["simulated_spread"]["ttft_p95_pct"] == pytest.approx(20.0)
    assert outcome.problems == ["problem 0.9", "problem 0.84", "problem 0.86"]


def test_medians_that_differ_stay_a_disagreement(run):
    outcome = run(*[(_figures(0.90), _figures(0.80))] * 3)
    assert not compare.agrees(outcome.entry)
