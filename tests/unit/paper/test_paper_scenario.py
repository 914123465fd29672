"""One run of the grid: its input, its figures, and that a pool changes nothing."""

import statistics

import pytest

from bench.paper import outcome, scenario
from bench.paper.pool import rows
from bench.paper.scenario import DECODE, Point, Run
from bench.paper.traffic import LENGTHS, Lengths, spread_lengths
from services.latency import OpKind
from services.simulator.clairvoyant import demands
from services.simulator.types import Microbatch, Request

_POINT = Point(8.0, 0.5, 0.06)


def _run(policy="separate", seed=0, point=_POINT, num_tasks=60, **changes):
    return Run(point, policy, seed, num_tasks, **changes)


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
    row = outcome.row(_run(policy))
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
    details, row = outcome.details(run), outcome.row(run)
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


def test_every_node_can_cut_training_for_whoever_asks():
    for policy in ("separate", "lemix"):
        assert {node.max_training_parts for node in scenario.cluster(_run(policy))} == {64}
        assert {node.core.gradient_buffers for node in scenario.cluster(_run(policy))} == {2}


def test_options_reach_the_policy():
    core = scenario.configuration(_run(options=(("one_stream", True),))).core
    assert core.policy_options == {"one_stream": True}


def test_data_parallel_nodes_have_the_whole_model():
    run = _run(point=Point(8.0, 0.5, 0.12), nodes=8, stages=1)
    nodes = scenario.cluster(run)
    assert len(nodes) == 8
    assert run.slo == _run().slo
    mean_s, split_s = (scenario.latency(each).node_s(OpKind.PREFILL, 1, 250) for each in (run, _run()))
    assert mean_s == pytest.approx(split_s)


def test_decoding_adds_outputs_batches_and_a_promise_per_token():
    run = _run(mode=DECODE, num_tasks=2000)
    requests = [task for task in scenario.work(run) if isinstance(task, Request)]
    assert statistics.mean(task.output_tokens for task in requests) == pytest.approx(64, rel=0.1)
    assert all(1 <= task.output_tokens <= task.max_tokens == 512 for task in requests)
    assert requests[0].slo.tpot_s == pytest.approx(5 * 2 * 0.006)
    assert scenario.cluster(run)[0].core.max_batch == 16
    assert _lengths(run) == _lengths(_run(num_tasks=2000))
    one, full = (scenario.latency(run).op_s(0, OpKind.DECODE, batch, 300) for batch in (1, 16))
    assert 0.006 < one < full == pytest.approx(0.012)


def test_a_decoding_row_judges_both_parts_of_the_promise_and_has_no_bound():
    row = outcome.row(_run(mode=DECODE))
    assert row["n_ok"] == 60
    assert (row["clairvoyant_node_s"], row["efficiency"]) == (None, None)
    assert 0.0 < row["slo_attainment"] <= 1.0


def test_beliefs_are_wrong_by_one_factor_per_node_and_change_nothing_real():
    nodes, exact = scenario.cluster(_run(belief_error=0.1)), scenario.cluster(_run())
    assert all(node.believed is None for node in exact)
    assert [node.latency for node in nodes] == [node.latency for node in exact]
    factors = set()
    for node in nodes:
        ratios = {
            round(node.believed.op_s(stage, op, 1, 300) / node.latency.op_s(stage, op, 1, 300), 9)
            for stage in range(2)
            for op in (OpKind.PREFILL, OpKind.TRAIN_BACKWARD)
        }
        assert len(ratios) == 1
        factors |= ratios
    assert len(factors) == 4
    assert scenario.cluster(_run("lemix", belief_error=0.1)) == nodes


@pytest.mark.parametrize("factor", [0.25, 0.5, 2.0])
def test_however_lengths_spread_the_mean_work_is_the_same(factor):
    def mean_work_s(lengths):
        run = _run(num_tasks=20_000, lengths=lengths)
        return statistics.mean(demand.stage_s[0] for demand in demands(scenario.work(run), scenario.cluster(run)))

    spread = spread_lengths(factor)
    assert mean_work_s(spread) == pytest.approx(mean_work_s(LENGTHS), rel=0.04)


def test_an_order_moves_lengths_and_nothing_else():
    rising = _run(lengths=Lengths(LENGTHS.shape, "ascending"))
    assert _lengths(rising) == sorted(_lengths(_run()))
    assert [(t.task_id, t.arrival_s) for t in scenario.work(rising)] == [
        (t.task_id, t.arrival_s) for t in scenario.work(_run())
    ]


def test_noise_changes_the_run_and_takes_the_bound_away():
    exact, noisy = outcome.row(_run("lemix")), outcome.row(_run("lemix", noise=0.1))
    assert exact["held_node_s"] != noisy["held_node_s"]
    assert noisy["clairvoyant_node_s"] is None


def test_the_fingerprint_tells_decisions_apart():
    one, same, other = (outcome.row(_run(policy))["decisions"] for policy in ("round_robin", "round_robin", "lemix"))
    assert one == same
    assert one != other


def test_training_waits_for_a_node_only_where_a_policy_holds_it_back():
    busy = Point(100.0, 0.5, 0.06)
    kept = outcome.row(_run("paper_additive", point=busy))
    free = outcome.row(_run("paper_additive", point=busy, options=(("hold_back", False),)))
    assert free["training_waiting_share"] == 0.0 == free["training_wait_max_s"]
    assert 0.0 < kept["training_waiting_share"] <= 1.0
    assert kept["training_wait_max_s"] > 0.0


def test_load_skew_and_alike_lengths():
    in_turn, packed = outcome.row(_run("round_robin")), outcome.row(_run("round_robin", options=(("max_nodes", 1),)))
    assert packed["load_skew"] == pytest.approx(3**0.5)
    assert packed["length_variance_within"] == pytest.approx(1.0)
    assert in_turn["load_skew"] < 0.1
    assert in_turn["length_variance_within"] < 1.0
