"""One run of the grid: its input, its figures, and that a pool changes nothing."""

import statistics

import pytest

from bench.paper import scenario
from bench.paper.pool import rows
from bench.paper.scenario import Point, Run
from services.simulator.types import Microbatch, Request

_POINT = Point(8.0, 0.5, 0.06)


def _run(policy="separate", seed=0, point=_POINT, num_tasks=60):
    return Run(point, policy, seed, num_tasks)


def _lengths(run):
    return [item.prompt_tokens if isinstance(item, Request) else item.length for item in scenario.work(run)]


def test_the_input_is_pinned():
    """Published figures belong to these tasks: a change of the generator must be noticed."""
    tasks = scenario.work(_run(num_tasks=1000))
    lengths = _lengths(_run(num_tasks=1000))
    assert lengths[:8] == [374, 247, 286, 262, 158, 355, 155, 145]
    assert sum(lengths) == 241970
    assert sum(isinstance(task, Microbatch) for task in tasks) == 497
    assert tasks[-1].arrival_s == pytest.approx(128.166277)


def test_the_input_depends_on_rate_share_and_seed_only():
    same = [_run("lemix"), _run(point=Point(8.0, 0.5, 0.03))]
    assert all(_lengths(run) == _lengths(_run()) for run in same)
    assert [w.arrival_s for w in scenario.work(same[0])] == [w.arrival_s for w in scenario.work(same[1])]
    assert _lengths(_run(seed=1)) != _lengths(_run())


def test_lengths_rate_and_share_are_as_published():
    run = _run(num_tasks=4000)
    lengths = _lengths(run)
    assert statistics.mean(lengths) == pytest.approx(250, rel=0.05)
    assert statistics.stdev(lengths) == pytest.approx(150, rel=0.1)
    assert min(lengths) >= 8
    assert max(lengths) <= 1024
    tasks = scenario.work(run)
    assert len(tasks) / tasks[-1].arrival_s == pytest.approx(8.0, rel=0.05)
    assert sum(isinstance(task, Microbatch) for task in tasks) / len(tasks) == pytest.approx(0.5, abs=0.03)


def test_the_promise_is_five_units():
    request = next(task for task in scenario.work(_run()) if isinstance(task, Request))
    assert request.slo.ttft_s == pytest.approx(5 * 2 * 0.06)
    assert request.output_tokens == 1


def test_load_counts_a_backward_twice():
    assert Point(10.0, 0.0, 0.1).load_nodes == pytest.approx(1.0)
    assert Point(10.0, 1.0, 0.1).load_nodes == pytest.approx(3.0)


def test_every_policy_gets_the_same_settings():
    one, two = (scenario.configuration(_run(policy)).core for policy in ("separate", "lemix"))
    assert (one.max_waiting_training, one.max_inflight_training, one.hold_s) == (1024, 32, 10.0)
    assert one.slo_unit_s == pytest.approx(0.12)
    assert {name for name in one.__slots__ if getattr(one, name) != getattr(two, name)} == {"policy"}


@pytest.mark.parametrize("policy", ["separate", "round_robin", "lemix"])
def test_a_row_holds_what_is_published(policy):
    row = scenario.row(_run(policy))
    assert set(row) >= {
        "mode", "rate", "training_share", "mean_forward_s", "policy", "seed", "n_tasks", "slo_units",
        "tasks_per_node_s", "tasks_per_held_node_s", "slo_attainment", "utilisation", "clairvoyant_node_s",
        "efficiency",
    }  # fmt: skip
    assert row["n_ok"] == row["n_tasks"] == 60
    assert row["efficiency"] == pytest.approx(row["clairvoyant_node_s"] / row["held_node_s"])
    assert 0.0 < row["efficiency"] <= 1.0
    assert row["tasks_per_held_node_s"] == pytest.approx(60 / row["held_node_s"])


def test_details_tell_of_the_same_run():
    run = _run("lemix")
    details, row = scenario.details(run), scenario.row(run)
    held_s = sum(end_s - begin_s for node in details.held.values() for begin_s, end_s in node)
    assert held_s == pytest.approx(row["held_node_s"])
    assert details.responses_s == sorted(details.responses_s)
    assert sum(at_s <= details.slo_s for at_s in details.responses_s) / len(details.responses_s) == pytest.approx(
        row["slo_attainment"]
    )


def test_the_pool_changes_nothing():
    runs = [_run(policy, seed, num_tasks=30) for policy in ("separate", "lemix") for seed in (0, 1, 2)]
    heard = []
    alone = rows(runs, 1, lambda num_done, run: heard.append((num_done, run)))
    assert heard == list(enumerate(runs, start=1))
    done = []
    assert rows(runs, 2, lambda num_done, run: done.append(num_done)) == alone
    assert done == [1, 2, 3, 4, 5, 6]
    assert [(row["policy"], row["seed"]) for row in alone] == [(run.policy, run.seed) for run in runs]


def test_an_error_in_a_worker_is_told():
    with pytest.raises(ValueError, match="unknown policy 'best'"):
        rows([_run("best"), _run()], 2, lambda num_done, run: None)
