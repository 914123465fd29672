"""A planner's cluster: figures and answers that can be worked out by hand."""

import math
import statistics
from dataclasses import replace

import pytest

from services.latency import LatencyModel, NodeLatency, OpKind
from services.node_agent.config import NodeAgentSettings
from services.scheduler.core.tasks import SloTarget
from services.simulator.figures import Figures, spread
from services.simulator.plan import Search, fewest
from services.simulator.pool import simulations
from services.simulator.scenario import (
    Demand,
    Node,
    Scenario,
    ScenarioError,
    Training,
    demand,
    simulate,
    slo_of_units,
)
from services.simulator.trace_file import TraceRow
from services.simulator.traffic import WORKLOADS, DrawnTraffic, RecordedTraffic, Traffic

_SECONDS = {"prefill": 1.0, "decode": 0.1, "train_forward": 1.0, "train_backward": 2.0, "optimizer_step": 0.5}
_LATENCY = NodeLatency(({OpKind(kind): LatencyModel("constant", (s,)) for kind, s in _SECONDS.items()},))
#: One prompt per prefill, as `max_prefill_tokens` holds no second one.
_NODE = Node(latency=_LATENCY, max_prefill_tokens=1)


@pytest.mark.parametrize(
    "limit",
    ["max_batch", "max_prefill_tokens", "kv_capacity_tokens", "max_inflight_inference", "max_training_parts"],
)
def test_a_planned_node_is_limited_like_one_that_runs(limit: str) -> None:
    assert getattr(Node(latency=_LATENCY), limit) == NodeAgentSettings.model_fields[limit].default


def test_a_node_cuts_training_into_as_many_pieces_as_it_is_told() -> None:
    assert replace(_NODE, max_training_parts=5).named("node").max_training_parts == 5


def _at(*times: float, output: int = 1) -> RecordedTraffic:
    return RecordedTraffic([TraceRow(time_s, 10, output) for time_s in times])


def _scenario(traffic: Traffic, *, nodes: int = 1, ttft_s: float = 1.0, **changes: object) -> Scenario:
    whole: dict[str, object] = {"node": _NODE, "policy": "least_loaded"} | changes
    return Scenario(num_nodes=nodes, traffic=traffic, slo=SloTarget(ttft_s=ttft_s), **whole)  # type: ignore[arg-type]


def test_figures_of_one_request() -> None:
    figures = simulate(_scenario(_at(2.0, output=5)), 0)
    assert figures.ttft_p50_s == figures.ttft_p99_s == pytest.approx(1.0)
    assert figures.tpot_p99_s == pytest.approx(0.1)
    assert figures.ended_s == pytest.approx(3.4)
    assert figures.held_node_s == pytest.approx(1.4 + 10.0)
    assert figures.tasks_per_held_node_s == pytest.approx(1 / 11.4)
    assert figures.output_tokens_per_s == pytest.approx(5 / 3.4)
    assert (figures.num_requests, figures.nodes_used, figures.utilisation) == (1, 1, pytest.approx(1.0))
    (load,) = figures.nodes
    assert (load.node_id, load.requests, load.microbatches) == ("node-0", 1, 0)
    assert (load.serving_share, load.training_share) == (pytest.approx(1.4 / 3.4), 0.0)


@pytest.mark.parametrize(("ttft_s", "kept"), [(0.9, 0), (1.0, 1), (2.5, 2), (4.0, 4)])
def test_attainment_counts_those_in_time(ttft_s: float, kept: int) -> None:
    """Four at once on one node get their first token after 1, 2, 3 and 4 seconds."""
    figures = simulate(_scenario(_at(0, 0, 0, 0), ttft_s=ttft_s), 0)
    assert figures.slo_attainment == kept / 4


def test_a_request_that_is_not_answered_is_a_miss_for_ever() -> None:
    figures = simulate(_scenario(_at(0, 5), ttft_s=100.0, horizon_s=5.5), 0)
    assert (figures.slo_attainment, figures.num_unfinished, figures.ttft_p99_s) == (0.5, 1, math.inf)
    assert figures.to_json()["ttft_p99_s"] is None


@pytest.mark.parametrize(
    ("at_once", "ttft_s", "answer"), [(5, 1.0, 5), (5, 2.0, 3), (5, 5.0, 1), (8, 3.5, 3), (1, 1, 1)]
)
def test_the_fewest_nodes_for_a_crowd(at_once: int, ttft_s: float, answer: int) -> None:
    """`at_once` requests of a second each, on nodes that serve `ttft_s` of them in time."""

    def look(value: float) -> bool:
        scenario = _scenario(_at(*([0.0] * at_once)), nodes=int(value), ttft_s=ttft_s + 1e-6)
        return simulate(scenario, 0).slo_attainment == 1.0

    assert fewest(Search(look), 16).value == answer


@pytest.mark.parametrize("rate", [10.0, 30.0])
def test_paced_training_is_trained_where_there_is_room(rate: float) -> None:
    """A micro-batch of 128 tokens takes 3.5 s: 36.6 tokens/s are the most one node can train."""
    training = Training(rate, 1, 128)
    figures = simulate(_scenario(_at(1000.0), training=training), 0)
    assert figures.trained_tokens_per_s == pytest.approx(rate, rel=0.02)


def test_a_backlog_fills_a_training_node() -> None:
    training = Training(math.inf, 1, 128)
    figures = simulate(_scenario(_at(1000.0), nodes=2, policy="separate", training=training), 0)
    assert figures.trained_tokens_per_s == pytest.approx(128 / 3.5, rel=0.02)
    assert figures.slo_attainment == 1.0


def test_the_demand_is_the_work_of_the_fullest_stage() -> None:
    scenario = _scenario(_at(0.0, 10.0, output=17), training=Training(64.0, 1, 128))
    assert demand(scenario, scenario.traffic.draw(0)) == pytest.approx(Demand(2 * (1 + 16 * 0.1 / 16) / 10, 3.5 / 2))


def test_a_promise_in_units_is_that_of_the_mean_request() -> None:
    assert slo_of_units(5.0, _LATENCY, _at(0.0, output=3).draw(0)) == SloTarget(5.0, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "nodes: must be 1 to 1024, got 0"),
        ({"nodes": 5000}, "nodes: must be 1 to 1024"),
        ({"policy": "best"}, "unknown policy 'best'"),
        ({"policy_options": {"speed": 1}}, "no option 'speed'"),
        (
            {"node": Node(latency=_LATENCY, kv_capacity_tokens=10)},
            "no request fits into kv_tokens 10, not even a prompt of 10 ",
        ),
        ({"node": Node(latency=_LATENCY, max_batch=0)}, "max_batch must be at least 1"),
        ({"node": Node(latency=NodeLatency(({},)))}, "profile: no time for prefill on stage 0"),
        ({"training": Training(-1.0)}, "training_tokens_per_s: must not be negative"),
        ({"training": Training(1.0, 0)}, "train_batch: must be at least 1"),
        (
            {"training": Training(1.0, 1, 128), "node": Node(latency=_LATENCY, max_context_tokens=64)},
            "train_length: 128 tokens do not fit",
        ),
        (
            {
                "training": Training(1.0),
                "node": Node(latency=NodeLatency(({OpKind.PREFILL: LatencyModel("constant", (1,))},))),
            },
            "no time for train_forward on stage 0; it cannot train",
        ),
    ],
)
def test_an_impossible_cluster_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        simulate(_scenario(_at(0.0), **changes), 0)  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_figures_and_another_does_not() -> None:
    traffic = DrawnTraffic(WORKLOADS["hh-rlhf"].shape, 1.0, 30.0)
    scenario = _scenario(traffic, nodes=3, noise=0.1, training=Training(math.inf))
    one, again, other = simulate(scenario, 1), simulate(scenario, 1), simulate(scenario, 2)
    assert one == again
    assert isinstance(other, Figures)
    assert one != other


def test_seeds_side_by_side_give_the_figures_of_one_after_the_other() -> None:
    scenario = _scenario(DrawnTraffic(WORKLOADS["hh-rlhf"].shape, 0.5, 20.0), nodes=2, noise=0.2)
    heard: list[int] = []
    with simulations(1) as one_by_one, simulations(2) as side_by_side:
        expected = one_by_one(scenario, (5, 2, 7), heard.append)
        assert heard == [5, 2, 7]
        assert side_by_side(scenario, (5, 2, 7), heard.append) == expected
    assert sorted(heard[3:]) == [2, 5, 7]


#: Means of the data the shapes are fitted to: prompt and output tokens.
_PUBLISHED = {
    "azure-conv": (1155, 211),
    "azure-code": (2048, 28),
    "sharegpt": (2340, 439),
    "lmsys-chat": (69.5, 214.5),
}


@pytest.mark.parametrize("name", sorted(_PUBLISHED))
def test_drawn_lengths_have_about_the_published_means(name: str) -> None:
    workload = WORKLOADS[name]
    rows = DrawnTraffic(workload.shape, 10.0, 2000.0).draw(3)
    prompt, output = _PUBLISHED[name]
    assert statistics.fmean(row.prompt_tokens for row in rows) == pytest.approx(prompt, rel=0.2)
    assert statistics.fmean(row.output_tokens for row in rows) == pytest.approx(output, rel=0.2)
    assert len(rows) / 2000.0 == pytest.approx(10.0, rel=0.05)


def test_speed_brings_a_trace_forward() -> None:
    rows = RecordedTraffic([TraceRow(1.0, 2, 3), TraceRow(4.0, 5, 6)], speed=2.0).draw(9)
    assert rows == [TraceRow(0.5, 2, 3), TraceRow(2.0, 5, 6)]


def test_traffic_is_neither_endless_nor_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = WORKLOADS["hh-rlhf"].shape
    with pytest.raises(ValueError, match="no request arrives within 1 s at 1e-09 requests/s"):
        DrawnTraffic(shape, 1e-9, 1.0).draw(0)
    monkeypatch.setattr("services.simulator.traffic.MOST_REQUESTS", 10)
    with pytest.raises(ValueError, match="100 requests/s for 10 s are over 10 requests"):
        DrawnTraffic(shape, 100.0, 10.0).draw(0)


def test_a_spread_is_median_lowest_highest() -> None:
    assert spread([3.0, 1.0, 10.0]) == (3.0, 1.0, 10.0)
