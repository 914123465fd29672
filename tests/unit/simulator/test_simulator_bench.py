"""The simulator's benchmark: what it measures and how it judges."""

import pytest

from bench import simulator
from bench.paper.scenario import Point, Run
from bench.report.summary import run_facts


def row(place: str, policy: str, ops_per_s: float) -> simulator.Row:
    return simulator.Row(place, policy, 100, 10, ops_per_s, ops_per_s, ops_per_s, ops_per_s / 10)


def test_a_simulation_is_timed_with_all_its_operations_and_decisions() -> None:
    num_ops, num_decisions, cpu_s = simulator.simulate(Run(Point(8.0, 0.5, 0.06), "separate", 0, 20))
    # Two stages; a micro-batch runs forward, backward and step on each.
    assert num_decisions == 20
    assert 2 * 20 <= num_ops <= 6 * 20
    assert cpu_s > 0.0


@pytest.mark.parametrize(("slowest", "met"), [(29_999.0, False), (30_000.0, True)])
def test_lemix_is_judged_at_its_slowest_place(slowest: float, met: bool) -> None:
    rows = [row("one", "lemix", 90_000.0), row("two", "lemix", slowest), row("one", "paper_additive", 10.0)]
    target = simulator.report(rows, 5)["target"]
    assert (target["place"], target["met"]) == ("two", met)


def test_the_page_and_the_last_line_tell_the_verdict() -> None:
    summary = run_facts() | simulator.report([row("one", "lemix", 10.0)], 5)
    assert "missed" in simulator.verdict(summary["target"])
    assert simulator.verdict(summary["target"]) in simulator.render(summary)
