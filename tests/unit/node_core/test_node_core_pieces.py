"""Prompts in pieces: they share ops with decodes under a budget of tokens, and no op exceeds it."""

import pytest

from services.latency import OpKind
from services.node_agent.core.types import Cancelled, NodeCoreConfig, Op
from tests.unit.node_core.driver import Driver, microbatch, request


def _driver(**config: object) -> Driver:
    return Driver(**{"num_stages": 1, "max_batch": 4, "max_batch_tokens": 10, **config})


def _prefills(driver: Driver) -> list[tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...], int]]:
    """Task ids, where their pieces start and end, and how many of them decode."""
    return [
        (op.task_ids, op.cached_tokens or (0,) * op.batch, op.end_tokens, op.decodes)
        for _, op in driver.ops(OpKind.PREFILL)
    ]


def test_a_long_prompt_is_computed_in_pieces_of_the_budget() -> None:
    driver = _driver().at(0.0, request("long", prompt=25, max_tokens=2)).run()
    assert _prefills(driver) == [
        (("long",), (0,), (10,), 0),
        (("long",), (10,), (20,), 0),
        (("long",), (20,), (25,), 0),
    ]
    assert driver.order() == "PPPD"
    assert driver.results == {"long": "length"}


def test_what_a_piece_leaves_of_the_budget_goes_to_the_next_prompt() -> None:
    driver = _driver().at(0.0, request("a", prompt=14), request("b", prompt=3), request("c", prompt=20)).run()
    assert [op[0] for op in _prefills(driver)] == [("a",), ("a", "b", "c"), ("c",), ("c",)]
    assert all(op.num_tokens <= 10 for _, op in driver.ops(OpKind.PREFILL))


def test_decoding_requests_come_first_and_lose_no_iteration_to_a_long_prompt() -> None:
    driver = _driver().at(0.0, request("r", prompt=4, max_tokens=6)).at(0.15, request("long", prompt=25)).run()
    mixed = [op for op in _prefills(driver) if op[3]]
    # Every op from the arrival on has the token of "r" and nine of the prompt.
    assert mixed == [
        (("long", "r"), (0,), (9,), 1),
        (("long", "r"), (9,), (18,), 1),
        (("long", "r"), (18,), (25,), 1),
    ]
    assert driver.order() == "PDPPPD"
    assert [op.decode_context_tokens for _, op in driver.ops(OpKind.PREFILL)[1:]] == [6, 7, 8]


def test_begun_prompts_that_come_back_together_share_no_op_beyond_the_largest_batch() -> None:
    """While a forward holds stage 0 up, the first pieces of both prompts leave the last stage."""
    durations = dict.fromkeys(OpKind, 0.1) | {OpKind.TRAIN_FORWARD: 5.0}
    driver = _driver(num_stages=2, max_batch=1, max_training_wait_s=0.15, durations=durations)
    driver.at(0.0, request("a", prompt=11), request("b", prompt=12), microbatch("m")).run()
    assert [op[0] for op in _prefills(driver)] == [("a",), ("b",), ("a",), ("b",)]
    assert driver.order().startswith("PPFPP")


def test_prompts_at_their_ends_come_before_the_others_in_an_op() -> None:
    """Also when the one that goes on was begun before them."""
    driver = _driver(max_batch_tokens=8).at(0.0, request("r", prompt=1, max_tokens=9))
    driver.at(0.01, request("long", prompt=20)).at(0.16, request("short", prompt=1)).run()
    ops = [op for _, op in driver.ops(OpKind.PREFILL)]
    assert all(op.first_ids + op.partial_ids + op.decode_ids == op.task_ids for op in ops)
    assert set(driver.results.values()) == {"length"}


def test_a_reference_comes_with_the_last_piece() -> None:
    driver = _driver().at(0.0, request("r", prompt=15, reference_tokens=30)).run()
    assert [op.num_tokens for _, op in driver.ops(OpKind.PREFILL)] == [10, 35]


def test_a_kept_prefix_is_taken_over_by_the_first_piece() -> None:
    driver = _driver(prefix_cache_tokens=100).at(0.0, request("t0", prompt=8, session_id="s"))
    driver.at(5.0, request("t1", prompt=30, session_id="s")).run()
    ops = [op for _, op in driver.ops(OpKind.PREFILL)][1:]
    assert [(op.cached_tokens, op.continued, op.end_tokens) for op in ops] == [
        ((8,), ("t0",), (18,)),
        ((18,), ("",), (28,)),
        ((28,), ("",), (30,)),
    ]


@pytest.mark.parametrize("num_stages", [1, 2])
def test_a_cancelled_request_leaves_between_its_pieces(num_stages: int) -> None:
    driver = _driver(num_stages=num_stages).at(0.0, request("long", prompt=100)).at(0.25, Cancelled("long")).run()
    assert driver.results == {"long": "cancelled"}
    assert driver.checker.freed["long"] == 1
    assert driver.core.snapshot().kv_used_tokens == 0
    assert driver.now_s < 0.5


def test_a_piece_that_fails_ends_its_request_and_those_that_decode_with_it() -> None:
    def fails(stage: int, op: Op) -> bool:
        return bool(op.partials and op.decodes)

    driver = _driver(fail=fails).at(0.0, request("r", prompt=4, max_tokens=20)).at(0.15, request("long", prompt=25))
    driver.run()
    assert driver.results == {"r": "error", "long": "error"}
    driver.give(request("next"))
    assert driver.run().results["next"] == "length"


def test_the_order_of_a_stage_can_change_between_pieces() -> None:
    """Another request's piece may come first when its deadline is nearer; nobody's pieces get mixed up."""
    driver = _driver(num_stages=2).at(0.0, request("slow", prompt=60, deadline_s=50.0))
    driver.at(0.3, request("fast", prompt=5, deadline_s=0.4)).run()
    assert driver.ended_s["fast"] < driver.ended_s["slow"]


@pytest.mark.parametrize("value", [-1, 3, 4])
def test_the_budget_leaves_room_for_a_prompt(value: int) -> None:
    with pytest.raises(ValueError, match="max_batch_tokens"):
        NodeCoreConfig(num_stages=1, max_batch=4, max_batch_tokens=value)
