"""Nodes of two speeds that are predicted alike."""

import pytest

from services.latency import LatencyModel, LatencyTable, MixedCost, NodeLatency, OpKind
from services.scheduler.core.policies.mean_costs import MeanCosts

PREFILL = OpKind.PREFILL


def _node(fixed_s: float, per_token_s: float) -> NodeLatency:
    return NodeLatency(({PREFILL: LatencyModel("affine", (fixed_s, per_token_s))},))


def test_a_mean_stays_a_mean_whoever_runs() -> None:
    slow, fast = MeanCosts.of_nodes([_node(0.03, 3e-4), _node(0.01, 1e-4)])
    mean_s = slow.node_s(PREFILL, 1, 100)
    assert mean_s == fast.node_s(PREFILL, 1, 100) == pytest.approx(0.04)
    # Both take what their profiles say, the fast one far more often.
    for index in range(200):
        costs, scale = (slow, 3.0) if index % 50 == 0 else (fast, 1.0)
        length = 50 + index
        costs.calibrate(0, PREFILL, 1, length, scale * (0.01 + 1e-4 * length))
    assert slow.node_s(PREFILL, 1, 100) == fast.node_s(PREFILL, 1, 100) == pytest.approx(mean_s)


def test_what_one_node_learns_moves_the_mean_by_its_share() -> None:
    first, second = MeanCosts.of_nodes([_node(0.01, 1e-4), _node(0.01, 1e-4)])
    for index in range(400):
        first.calibrate(0, PREFILL, 1, 50 + index, 2.0 * (0.01 + 1e-4 * (50 + index)))
    assert first.node_s(PREFILL, 1, 100) == second.node_s(PREFILL, 1, 100) == pytest.approx(0.03, rel=0.02)
    assert [len(costs.records()) for costs in (first, second)] == [1, 0]


def test_profiles_of_other_forms_and_grids_are_averaged_too() -> None:
    def tabulated(*lengths: int, scale: float) -> NodeLatency:
        table = LatencyTable((1,), lengths, tuple(scale * length for length in lengths))
        return NodeLatency(({PREFILL: LatencyModel("tabulated", (), table=table)},))

    every = MeanCosts.of_nodes([_node(0.0, 1e-3), tabulated(50, 200, scale=3e-3), tabulated(40, 100, scale=5e-3)])
    assert [costs.stage_s(0, PREFILL, 1, 100) for costs in every] == pytest.approx([0.3] * 3)
    assert every[0].node_s(PREFILL, 1, 60) == pytest.approx(0.18)


def test_who_has_no_model_or_other_stages_is_no_part_of_the_mean() -> None:
    one, none = _node(0.01, 1e-4), NodeLatency(({},))
    two = NodeLatency(_node(0.03, 3e-4).models * 2)
    costs = MeanCosts.of_nodes([one, none, two])
    assert [item.node_s(PREFILL, 1, 100) for item in costs] == pytest.approx([0.02, 0.02, 0.12])
    costs[1].calibrate(0, PREFILL, 1, 100, 0.02)
    assert costs[0].node_s(PREFILL, 1, 100) == pytest.approx(0.02)


def test_what_a_prefill_and_a_decode_cost_together_is_averaged() -> None:
    mixed = NodeLatency(({},), mixed=(MixedCost(0.5, 0.5, 0.0),))
    costs = MeanCosts.of_nodes([mixed, NodeLatency(({},))])
    assert costs[0].mixed_s(0, 1.0, 1.0) == costs[1].mixed_s(0, 1.0, 1.0) == pytest.approx(1.5)
