"""KV caches kept for sessions between their turns: what a turn saves, and who makes room for whom."""

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.latency import OpKind
from services.node_agent.core.node import NodeCore
from services.node_agent.core.prefix import Prefix, PrefixCache
from services.node_agent.core.types import (
    Cancelled,
    Event,
    FreeKv,
    NodeCoreConfig,
    Op,
    OpDone,
    QueueOrder,
    RequestArrived,
)
from tests.unit.node_core.driver import Driver, request, sync


def turn(name: str, prompt: int, output: int = 1, session: str = "s") -> RequestArrived:
    """A turn of a session that ends after `output` tokens."""
    return request(name, prompt=prompt, max_tokens=output, session_id=session)


def _driver(**config: object) -> Driver:
    return Driver(**{"num_stages": 1, "prefix_cache_tokens": 100, **config})


def _prefills(driver: Driver) -> list[tuple[int, tuple[int, ...], tuple[str, ...]]]:
    """New tokens, cached tokens and the requests whose KV cache is taken over, per prefill."""
    return [(op.num_tokens, op.cached_tokens, op.continued) for _, op in driver.ops(OpKind.PREFILL)]


def test_the_next_turn_computes_what_is_new() -> None:
    driver = _driver().at(0.0, turn("t0", 10, output=5)).at(5.0, turn("t1", 30)).run()
    # Of ten and five tokens the newest has not been read by any op.
    assert _prefills(driver) == [(10, (), ()), (16, (14,), ("t0",))]


def test_a_prompt_that_is_all_there_still_computes_its_last_token() -> None:
    driver = _driver().at(0.0, turn("t0", 20)).at(5.0, turn("t1", 8)).run()
    assert _prefills(driver)[1] == (1, (7,), ("t0",))


@pytest.mark.parametrize("other", [turn("t1", 30, session="other"), request("t1", prompt=30)])
def test_other_sessions_and_requests_without_one_find_nothing(other: RequestArrived) -> None:
    driver = _driver().at(0.0, turn("t0", 20)).at(5.0, other).run()
    assert _prefills(driver)[1] == (30, (), ())


def test_nothing_is_kept_by_default() -> None:
    driver = Driver(num_stages=1).at(0.0, turn("t0", 20)).at(5.0, turn("t1", 30)).run()
    assert _prefills(driver)[1] == (30, (), ())
    assert driver.checker.freed["t0"] == 1


def test_two_requests_of_a_session_at_once_take_it_over_once() -> None:
    driver = _driver(max_prefill_tokens=19).at(0.0, turn("t0", 10)).at(4.95, request("busy", prompt=3))
    driver.at(5.0, turn("a", 15, output=9), turn("b", 15)).run()
    # The second finds nothing, so both do not fit the budget together.
    assert _prefills(driver)[2:] == [(5, (10,), ("t0",)), (15, (), ())]
    assert set(driver.checker.kept) == {"a"}


def test_saved_tokens_leave_room_in_the_budget_of_a_prefill() -> None:
    driver = _driver(max_prefill_tokens=12).at(0.0, turn("a0", 20, session="a"), turn("b0", 20, session="b"))
    driver.at(4.95, request("busy", prompt=3))
    driver.at(5.0, turn("a1", 25, session="a"), turn("b1", 25, session="b")).run()
    assert _prefills(driver)[-1] == (10, (20, 20), ("a0", "b0"))


@pytest.mark.parametrize("failed", ["cancelled", "error"])
def test_a_turn_that_ends_badly_leaves_nothing(failed: str) -> None:
    driver = _driver(fail=lambda stage, op: failed == "error" and op.kind is OpKind.DECODE)
    driver.at(0.0, turn("t0", 20, output=50))
    if failed == "cancelled":
        driver.at(0.5, Cancelled("t0"))
    driver.run()
    assert driver.results == {"t0": failed}
    assert driver.checker.freed["t0"] == 1
    assert driver.core.snapshot().kv_kept_tokens == 0


def test_a_failed_prefill_frees_what_it_took_over_on_every_stage() -> None:
    driver = _driver(num_stages=2, fail=lambda stage, op: op.task_ids == ("t1",))
    driver.at(0.0, turn("t0", 20)).at(5.0, turn("t1", 30)).run()
    assert driver.results["t1"] == "error"
    assert driver.checker.freed["t0"] == driver.checker.freed["t1"] == 1


def test_what_was_used_longest_ago_goes_first() -> None:
    driver = _driver(prefix_cache_tokens=50)
    for index, session in enumerate(("a", "b", "a", "c")):
        driver.at(float(index), turn(f"{session}{index}", 20, session=session))
    driver.run()
    assert set(driver.checker.kept) == {"a2", "c3"}
    assert driver.checker.freed["b1"] == 1


def test_kept_caches_make_room_for_a_request_before_it_runs() -> None:
    driver = (
        _driver(kv_capacity_tokens=60).at(0.0, turn("a", 30, session="a")).at(1.0, turn("b", 20, session="b")).run()
    )
    assert set(driver.checker.kept) == {"a", "b"}
    commands = driver.give(request("big", prompt=20, max_tokens=5))
    assert commands[0] == FreeKv("a")
    assert isinstance(driver.core.snapshot().running_ops[0], Op)
    assert set(driver.checker.kept) == {"b"}


def test_weights_of_another_epoch_find_nothing() -> None:
    driver = _driver(epoch_steps=2)
    driver.at(0.0, turn("t0", 10)).at(1.0, sync("first", True))
    driver.at(2.0, turn("t1", 20)).at(3.0, sync("second", True)).at(4.0, turn("t2", 30)).run()
    assert [cached for _, cached, _ in _prefills(driver)] == [(), (10,), ()]
    assert driver.checker.freed["t1"] == 1


def test_a_turn_that_began_in_another_epoch_is_not_kept_for_the_new_one() -> None:
    driver = (
        _driver(epoch_steps=1).at(0.0, turn("t0", 10, output=20)).at(0.2, sync("s", True), turn("x", 5, session="x"))
    )
    driver.run()
    assert set(driver.checker.kept) == {"x"}


def test_another_queue_order_keeps_what_is_kept() -> None:
    driver = _driver().at(0.0, turn("t0", 10)).run()
    driver.core = driver.core.with_order(driver.core.config.ordered(QueueOrder.FIFO))
    driver.at(1.0, turn("t1", 20)).run()
    assert _prefills(driver)[1] == (10, (10,), ("t0",))


@pytest.mark.parametrize(
    ("field", "value"),
    [("prefix_cache_tokens", -1), ("epoch_steps", 0), ("kv_block_tokens", 0), ("kv_block_tokens", 1 << 31)],
)
def test_bounds_are_checked(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=field):
        NodeCoreConfig(num_stages=1, **{field: value})


turns = st.tuples(
    st.integers(0, 60).map(lambda tick: tick * 0.05),
    st.integers(1, 50),
    st.integers(1, 10),
    st.sampled_from(["", "a", "b", "c", "d"]),
)


def _log(config: NodeCoreConfig, events: list[tuple[float, Event]]) -> list[str]:
    driver = Driver(core=NodeCore(config))
    for time_s, event in events:
        driver.at(time_s, event)
    return driver.run().log


@settings(max_examples=150, deadline=None)
@given(
    st.lists(turns, max_size=25),
    st.integers(60, 140),
    st.integers(1, 200),
    st.integers(1, 3),
    st.lists(st.integers(0, 60), max_size=4),
)
@example([(0.0, 1, 1, ""), (0.0, 42, 6, "a"), (0.0, 14, 1, ""), (0.45, 1, 1, "a")], 60, 47, 1, [])
def test_no_request_ever_waits_for_a_kept_cache(
    work: list[tuple[float, int, int, str]], capacity: int, kept: int, num_stages: int, changes: list[int]
) -> None:
    """When durations do not depend on what is saved, everything runs at the very time it would run without."""
    events: list[tuple[float, Event]] = [
        (time_s, request(f"r{index}", prompt, output, session_id=session))
        for index, (time_s, prompt, output, session) in enumerate(work)
    ]
    events += [(tick * 0.05, sync(f"s{index}", True)) for index, tick in enumerate(changes)]
    config = NodeCoreConfig(num_stages=num_stages, max_batch=3, kv_capacity_tokens=capacity)
    assert _log(replace(config, prefix_cache_tokens=kept, epoch_steps=2), events) == _log(config, events)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 60),
    st.sampled_from([1, 8]),
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.sampled_from("abc"), st.integers(1, 40), st.integers(0, 80)),
            st.tuples(st.just("take"), st.sampled_from("abcd")),
            st.tuples(st.just("shrink"), st.integers(0, 60)),
            st.tuples(st.just("enter"), st.integers(0, 2)),
        ),
        max_size=30,
    ),
)
def test_the_cache_stays_in_its_bounds_and_every_prefix_leaves_once(
    most: int, block: int, steps: list[tuple[str, str | int, int, int]]
) -> None:
    cache = PrefixCache(most, block)
    inside: dict[str, Prefix] = {}
    for number, (action, argument, *more) in enumerate(steps):
        freed: list[str] = []
        if action == "put":
            tokens, room = more
            prefix = Prefix(str(number), tokens)
            freed = cache.put(str(argument), prefix, cache._epoch, room)
            inside[prefix.task_id] = prefix
            assert cache.used_tokens <= room or prefix.task_id in freed
        elif action == "take":
            taken = cache.take(str(argument))
            assert taken is None or inside.pop(taken.task_id) == taken
        elif action == "shrink":
            freed = cache.shrink(int(argument))
            assert cache.used_tokens <= int(argument)
        else:
            freed = cache.enter(int(argument))
        for task_id in freed:
            del inside[task_id]
        assert cache.used_tokens == sum(-(-prefix.tokens // block) * block for prefix in inside.values()) <= most


def test_a_fork_of_the_cache_is_independent() -> None:
    cache = PrefixCache(50)
    cache.put("a", Prefix("t", 10), 0, 50)
    twin = cache.fork()
    twin.enter(1)
    assert cache.tokens_of("a") == 10
    assert (twin.tokens_of("a"), twin.used_tokens) == (0, 0)


def test_the_end_of_an_op_that_never_ran_changes_nothing_that_is_kept() -> None:
    driver = _driver().at(0.0, turn("t0", 10)).run()
    with pytest.raises(ValueError, match="runs nothing"):
        driver.core.step(1.0, OpDone(0, 99))
    assert driver.core.snapshot().kv_kept_tokens == 10
