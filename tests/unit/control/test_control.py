"""The control plane benchmark: what it sends, and how CPU time becomes a price."""

import pytest

from bench.control.__main__ import HOPS, TOTAL, cost_ms, report
from bench.control.cluster import ControlConfig, Phase, plan
from bench.live.errors import LiveError


def _phases(gateway_s: float = 0.5) -> list[Phase]:
    return [
        Phase("idle", 10.0, {"gateway": 0.1, "scheduler": 0.2}),
        Phase("requests", 20.0, {"gateway": gateway_s, "scheduler": 0.4, "redis": 0.1}, 100, 1600, {"decode": 900}),
        Phase("training", 10.0, {"gateway": 0.1, "scheduler": 0.7}, ops={"train_forward": 300, "optimizer_step": 200}),
    ]


def test_the_price_of_a_request_is_without_what_is_used_idle() -> None:
    cost = cost_ms(_phases(), "requests")
    assert cost["gateway"] == pytest.approx(3.0)
    assert cost["scheduler"] == pytest.approx(0.0)
    assert cost["redis"] == pytest.approx(1.0)
    assert cost[TOTAL] == pytest.approx(4.0)


def test_training_is_priced_per_operation() -> None:
    assert cost_ms(_phases(), "training")["scheduler"] == pytest.approx(1.0)


def test_a_phase_in_which_nothing_ran_has_no_price() -> None:
    with pytest.raises(LiveError, match="training"):
        cost_ms([_phases()[0], Phase("training", 10.0, {})], "training")


def test_the_report_holds_medians_with_their_spread() -> None:
    summary = report([_phases(0.4), _phases(0.5), _phases(1.2)])
    assert summary["per_request_ms"]["gateway"] == pytest.approx((2.0, 3.0, 10.0))
    assert summary["gateway"]["cpu_ms_per_request"]["gateway"] == pytest.approx(3.0)
    assert set(summary["gateway"]["cpu_ms_per_request"]) == {*HOPS, TOTAL}


def test_the_load_is_the_same_for_a_seed_and_within_its_bounds() -> None:
    config = ControlConfig(seconds=30.0, rate=10.0, seed=3)
    requests = plan(config)
    assert requests == plan(config)
    assert requests != plan(ControlConfig(seconds=30.0, rate=10.0, seed=4))
    assert 200 < len(requests) < 400
    assert all(0.0 < request.at_s < 30.0 for request in requests)
    assert all(32 <= len(request.prompt) <= 384 and 4 <= request.max_tokens <= 64 for request in requests)
