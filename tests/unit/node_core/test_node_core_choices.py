"""Choices of one prompt: those that wait when it ends share what was computed."""

import pytest

from services.latency import OpKind
from services.node_agent.core.types import Cancelled, InferenceRequest, MemoryConfig, RequestArrived
from tests.unit.node_core.driver import Driver, request


def _choices(count: int, prompt: int = 20, max_tokens: int = 3, first: str = "r") -> list[RequestArrived]:
    names = [first, *(f"{first}#{index}" for index in range(1, count))]
    return [request(name, prompt, max_tokens, choice_of="" if name == first else first) for name in names]


def _driver(**config: object) -> Driver:
    """Its only stage is busy for the first 0.1 s, so that what comes then waits together."""
    driver = Driver(**{"num_stages": 1, "max_batch": 8} | config)
    return driver.at(0.0, request("busy", prompt=1, max_tokens=1))


def _prefills(driver: Driver) -> list[tuple[tuple[str, ...], tuple[str, ...], int, int]]:
    """Of every prefill but the first: its requests, whose prompts they share, computed tokens and computed prompts."""
    ops = [op for _, op in driver.ops(OpKind.PREFILL)][1:]
    return [(op.task_ids, op.shares, op.num_tokens, op.batch) for op in ops]


def test_choices_that_wait_are_computed_once() -> None:
    driver = _driver().at(0.01, *_choices(3), request("other", prompt=5, max_tokens=1)).run()
    assert _prefills(driver) == [(("r", "other", "r#1", "r#2"), ("", "", "r", "r"), 25, 2)]
    assert set(driver.results.values()) == {"length"}
    assert [op.batch for _, op in driver.ops(OpKind.DECODE)] == [3, 3]


def test_what_comes_when_the_first_one_runs_is_computed_once_more() -> None:
    driver = Driver(num_stages=1).at(0.0, *_choices(4)).run()
    prefills = [op for _, op in driver.ops(OpKind.PREFILL)]
    assert [(op.task_ids, op.shares) for op in prefills] == [(("r",), ()), (("r#1", "r#2", "r#3"), ("", "r#1", "r#1"))]


def test_choices_wait_for_the_end_of_a_prompt_in_pieces() -> None:
    driver = _driver(max_batch_tokens=12).at(0.01, *_choices(3, prompt=30)).run()
    assert _prefills(driver) == [
        (("r",), (), 12, 1),
        (("r",), (), 12, 1),
        (("r", "r#1", "r#2"), ("", "r", "r"), 6, 1),
    ]


@pytest.mark.parametrize("mixed", [0, 16])
@pytest.mark.parametrize("limit", [{"max_batch": 3}, {"kv_capacity_tokens": 75}])
def test_choices_without_room_are_computed_later_together(limit: dict[str, int], mixed: int) -> None:
    driver = _driver(**limit, max_batch_tokens=mixed).at(0.01, *_choices(5, prompt=15, max_tokens=10)).run()
    shared = [op for _, op in driver.ops(OpKind.PREFILL) if op.shares]
    assert [op.first_ids for op in shared] == [("r", "r#1", "r#2"), ("r#3", "r#4")]
    assert [op.shares for op in shared] == [("", "r", "r"), ("", "r#3")]
    assert driver.results["r#4"] == "length"


def test_the_memory_of_every_choice_counts() -> None:
    memory = MemoryConfig(peak_bytes=50, kv_bytes_per_token=1, activation_bytes_per_token=1, kappa=1.0)
    driver = _driver(num_stages=2, memory=memory).at(0.01, *_choices(4)).run()
    assert [op.shares for _, op in driver.ops(OpKind.PREFILL)][1:] == [("", "r"), ("", "r#2")]
    assert set(driver.results.values()) == {"length"}


def test_another_prompt_or_a_reference_is_not_shared() -> None:
    driver = _driver()
    driver.at(0.01, request("r", 20), request("r#1", 21, choice_of="r"))
    driver.at(0.01, RequestArrived(InferenceRequest("r#2", 0.0, 20, 1, reference_tokens=2, choice_of="r"))).run()
    assert all(not op.shares for _, op in driver.ops(OpKind.PREFILL))
    assert set(driver.results.values()) == {"length"}


def test_choices_go_on_when_the_one_they_wait_for_leaves() -> None:
    driver = _driver(max_batch_tokens=12).at(0.01, *_choices(3, prompt=30)).at(0.15, Cancelled("r")).run()
    assert driver.results["r"] == "cancelled"
    assert _prefills(driver)[-1][:2] == (("r#1", "r#2"), ("", "r#1"))


def test_a_cancelled_choice_waits_no_more() -> None:
    driver = _driver().at(0.01, *_choices(3)).at(0.05, Cancelled("r#1")).run()
    assert _prefills(driver) == [(("r", "r#2"), ("", "r"), 20, 1)]


def test_a_choice_that_gave_its_blocks_up_shares_nothing_more() -> None:
    """Its output is its own; one that had none yet may."""
    driver = _driver(kv_capacity_tokens=40, expected_output_tokens=1, max_batch=4)
    driver.at(0.01, *_choices(2, prompt=10, max_tokens=15)).run()
    assert driver.checker.preempted == {"r#1": 1}
    assert driver.results == {"busy": "length", "r": "length", "r#1": "length"}
    assert [op.shares for _, op in driver.ops(OpKind.PREFILL)][1:] == [("", "r"), ()]


def test_choices_fail_with_their_op() -> None:
    driver = Driver(num_stages=1, fail=lambda stage, op: bool(op.shares)).at(0.0, *_choices(3)).run()
    assert driver.results == {"r": "length", "r#1": "error", "r#2": "error"}
