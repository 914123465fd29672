"""What a stage takes next."""

from itertools import pairwise

import pytest

from services.latency import OpKind
from services.node_agent.core.types import Event, NodeCoreConfig, QueueOrder
from tests.unit.node_core.checker import TRAINING
from tests.unit.node_core.driver import Driver, microbatch, request


def _flood(count: int, every_s: float, max_tokens: int = 20) -> list[tuple[float, Event]]:
    times = [i * every_s for i in range(count)]
    return [(t, request(f"r{i}", max_tokens=max_tokens, arrival_s=t, deadline_s=t + 0.5)) for i, t in enumerate(times)]


def test_inference_first_lets_training_have_what_is_left() -> None:
    driver = Driver(num_stages=1).at(0.0, request("a", max_tokens=4), microbatch("m0")).run()
    assert driver.order() == "PDDDFBS"


def test_fifo_takes_ops_as_they_became_ready() -> None:
    driver = Driver(num_stages=1, queue_order=QueueOrder.FIFO)
    driver.at(0.0, request("a", max_tokens=3)).at(0.01, microbatch("m0")).at(0.02, request("b")).run()
    assert driver.order() == "PFPDBDS"


@pytest.mark.parametrize(("deadline_s", "order"), [(0.26, "PDPPD"), (5.0, "PDPDPDD")])
def test_a_prefill_near_its_deadline_goes_before_a_decode_and_a_fresh_one_after(deadline_s: float, order: str) -> None:
    driver = Driver(num_stages=1, max_batch=3).at(0.0, request("run", max_tokens=5, tpot_s=0.2))
    driver.at(0.12, request("other", arrival_s=0.12))
    # From 0.15 to 0.25 "other" is prefilled: by then "run" has used half of its 0.2 s, "new" 83 % or 1 % of its time.
    driver.at(0.2, request("new", arrival_s=0.2, deadline_s=deadline_s)).run()
    assert driver.order().startswith(order)


def test_prefills_do_not_starve_decodes() -> None:
    driver = Driver(num_stages=1, max_batch=2, max_prefill_tokens=10)
    driver.at(0.0, request("run", max_tokens=12, tpot_s=0.2))
    for i in range(30):
        driver.at(i * 0.1, request(f"p{i}", arrival_s=i * 0.1, deadline_s=i * 0.1 + 1.0))
    driver.run()
    decodes = [time_s for time_s, _ in driver.ops(OpKind.DECODE)]
    gaps = [b - a for a, b in pairwise(decodes)]
    assert max(gaps) < 1.0
    assert driver.ended_s["run"] < 3.5


def test_decodes_do_not_starve_prefills() -> None:
    driver = Driver(num_stages=2, max_batch=2, durations=lambda s, o: 0.3)
    driver.at(0.0, *[request(f"run{i}", max_tokens=100, tpot_s=0.01) for i in range(3)])
    driver.at(5.0, request("new", arrival_s=5.0, deadline_s=6.0)).run()
    prefill_s = driver.ops(OpKind.PREFILL)[-1][0]
    assert prefill_s < 70.0
    assert driver.results["new"] == "length"


def test_backward_goes_before_step_before_forward() -> None:
    driver = Driver(num_stages=1, max_inflight_training=2)
    driver.at(0.0, *[microbatch(f"m{i}", accumulation=2) for i in range(4)]).run()
    assert driver.order() == "FBFBSFBFBS"


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("weight_handling", ["drain", "stash"])
def test_training_gets_its_turn_under_continuous_inference(num_stages: int, weight_handling: str) -> None:
    wait_s = 0.5
    driver = Driver(num_stages=num_stages, max_batch=4, max_training_wait_s=wait_s, weight_handling=weight_handling)
    driver.at(0.0, *[microbatch(f"m{i}", accumulation=2) for i in range(8)])
    for time_s, event in _flood(600, 0.05, max_tokens=8):
        driver.at(time_s, event)
    driver.run(until_s=30.0)
    assert driver.core.snapshot().waiting_requests > 50, "inference must never pause in this test"
    starts = sorted(time_s for time_s, stage, op in driver.runs if stage == 0 and op.kind in TRAINING)
    # One turn per wait on each of the stages a micro-batch crosses twice, plus the op that is running.
    bound_s = 2 * num_stages * (wait_s + 2 * 0.4)
    assert max(b - a for a, b in pairwise(starts)) <= bound_s
    assert sum(reason == "trained" for reason in driver.results.values()) >= 2


def test_training_takes_no_more_than_its_turn_while_inference_waits() -> None:
    driver = Driver(num_stages=1, max_batch=4, max_training_wait_s=1.0, max_inflight_training=8)
    driver.at(0.0, *[microbatch(f"m{i}", accumulation=8) for i in range(8)])
    for time_s, event in _flood(200, 0.02, max_tokens=8):
        driver.at(time_s, event)
    driver.run(until_s=6.0)
    ends = [(time_s, op) for time_s, _, op in driver.runs if op.kind in TRAINING]
    gaps = [b - a for (a, _), (b, _) in pairwise(ends[1:])]
    assert gaps
    assert min(gaps) >= 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_stages", 0), ("max_batch", 0), ("max_bypass", -1), ("default_tpot_s", 0.0), ("weight_handling", "copy")],
)
def test_a_senseless_bound_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        NodeCoreConfig(**{"num_stages": 1, field: value})  # type: ignore[arg-type]
