"""Admission by expected output: who needs more takes blocks of those admitted later, who are computed again."""

from hypothesis import given, settings
from hypothesis import strategies as st

from services.latency import OpKind
from services.node_agent.core.types import Cancelled, MemoryConfig
from tests.unit.node_core.driver import Driver, request


def _driver(**config: object) -> Driver:
    small = {"kv_capacity_tokens": 32, "kv_block_tokens": 4, "expected_output_tokens": 2}
    return Driver(**{"num_stages": 1, "max_batch": 4, **small, **config})


def _two(**config: object) -> Driver:
    """Two requests that fit at first: 10 + 2 tokens each; in the end each needs 24 of 32."""
    return _driver(**config).at(0.0, request("a", max_tokens=14), request("b", max_tokens=14)).run()


def test_more_run_at_once_than_the_worst_case_allows() -> None:
    assert max(op.batch for _, op in _two().ops(OpKind.DECODE)) == 2
    assert max(op.batch for _, op in _two(expected_output_tokens=0).ops(OpKind.DECODE)) == 1


def test_the_request_admitted_last_is_computed_again_with_its_output() -> None:
    driver = _two()
    assert driver.results == {"a": "length", "b": "length"}
    assert driver.checker.preempted == {"b": 1}
    assert driver.core.snapshot().preemptions == 1
    again = driver.ops(OpKind.PREFILL)[-1][1]
    # 10 of the prompt and what it had produced when "a" needed its blocks.
    assert again.task_ids == ("b",)
    produced = sum("b" in op.task_ids for _, op in driver.ops(OpKind.DECODE)[:6]) + 1
    assert again.num_tokens == 10 + produced
    assert driver.ended_s["a"] < driver.ended_s["b"]


def test_nobody_gets_a_token_twice_or_too_few() -> None:
    driver = _driver(kv_capacity_tokens=48).at(0.0, *[request(f"r{i}", max_tokens=20) for i in range(4)]).run()
    assert sum(driver.checker.preempted.values()) > 0
    tokens = sum(len(op.first_ids) for _, op in driver.ops(OpKind.PREFILL))
    tokens += sum(len(op.task_ids) for _, op in driver.ops(OpKind.DECODE))
    assert tokens == 4 * 20


def test_after_its_last_preemption_a_request_keeps_its_blocks() -> None:
    driver = _driver(max_preemptions=1, kv_capacity_tokens=48)
    driver.at(0.0, *[request(f"r{i}", max_tokens=20) for i in range(4)]).run()
    assert max(driver.checker.preempted.values()) == 1
    assert set(driver.results.values()) == {"length"}


def test_without_preemptions_left_the_worst_case_is_reserved() -> None:
    assert not _two(max_preemptions=0).checker.preempted


def test_a_request_that_gave_up_its_blocks_can_be_cancelled() -> None:
    driver = _driver().at(0.0, request("a", max_tokens=14), request("b", max_tokens=14))
    driver.run(until_s=0.5)
    assert driver.checker.preempted == {"b": 1}
    driver.give(Cancelled("b"))
    assert driver.results == {"b": "cancelled"}
    driver.run()
    assert driver.results["a"] == "length"
    assert driver.core.snapshot().kv_used_tokens == 0


def test_a_request_that_gives_its_blocks_up_gives_up_its_memory() -> None:
    """On both stages, wherever it is; computed again, it is larger by its output so far."""
    memory = MemoryConfig(peak_bytes=24, kv_bytes_per_token=1, activation_bytes_per_token=1, kappa=1.0, max_wait_s=0.01)
    driver = _driver(num_stages=2, memory=memory)
    driver.at(0.0, request("a", max_tokens=14), request("b", max_tokens=14)).run()
    assert driver.checker.preempted == {"b": 1}
    assert driver.results == {"a": "length", "b": "length"}
    counters = driver.core.snapshot().memory
    assert counters is not None
    assert counters.used_bytes == counters.host_bytes == (0, 0)


def test_a_request_with_room_goes_on_although_one_without_has_waited_longer() -> None:
    """Two stages run two requests and decode one at a time: who lacks a block may have to let the other go first."""
    driver = _driver(num_stages=2, max_batch=1, max_preemptions=1)
    driver.at(0.0, request("a", prompt=8, max_tokens=14), request("b", prompt=4, max_tokens=13)).run()
    assert driver.results == {"a": "length", "b": "length"}


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(20, 40),
    st.sampled_from([1, 4]),
    st.integers(1, 3),
    st.integers(0, 2),
    st.sampled_from([0, 1, 4]),
    st.lists(st.tuples(st.integers(1, 8), st.integers(9, 15)), min_size=2, max_size=6),
)
def test_all_come_to_their_end(
    stages: int,
    max_batch: int,
    capacity: int,
    block: int,
    expected: int,
    preemptions: int,
    prompts: int,
    lengths: list[tuple[int, int]],
) -> None:
    driver = _driver(
        num_stages=stages,
        max_batch=max_batch,
        max_batch_tokens=prompts and max_batch + prompts,
        kv_capacity_tokens=capacity,
        kv_block_tokens=block,
        expected_output_tokens=expected,
        max_preemptions=preemptions,
    )
    driver.at(0.0, *[request(f"r{i}", prompt, tokens) for i, (prompt, tokens) in enumerate(lengths)]).run()
    fits = [-(-(prompt + tokens) // block) <= capacity // block for prompt, tokens in lengths]
    assert driver.results == {f"r{i}": "length" if one else "error" for i, one in enumerate(fits)}
