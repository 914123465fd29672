"""Nodes of two speeds that are predicted alike."""

import pytest

from services.latency import LatencyModel, LatencyTable, NodeLatency, OpKind
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


def test_who_has_another_form_or_no_model_is_no_part_of_the_mean() -> None:
    table = LatencyTable((1,), (50, 100), (0.5, 1.0))
    tabulated = NodeLatency(({PREFILL: LatencyModel("tabulated", (), table=table)},))
    first, other, none = MeanCosts.of_nodes([_node(0.01, 1e-4), tabulated, NodeLatency(({},))])
    for costs in (other, none, first):
        costs.calibrate(0, PREFILL, 1, 100, 0.02)
    assert none.node_s(PREFILL, 1, 100) == other.node_s(PREFILL, 1, 100) == pytest.approx(0.02)
