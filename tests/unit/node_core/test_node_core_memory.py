"""Wait or offload: what does not fit a stage waits for room, then other tasks' data makes room, then it runs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.latency import MOVES, OpKind
from services.node_agent.core.node import NodeCore
from services.node_agent.core.node_memory import NodeMemory
from services.node_agent.core.running import Claim
from services.node_agent.core.running_requests import RunningRequests
from services.node_agent.core.stage_queue import Flight
from services.node_agent.core.types import (
    Cancelled,
    MemoryConfig,
    MemoryCounters,
    NodeCoreConfig,
    Op,
    OpDone,
    QueueOrder,
    RequestArrived,
    RunOp,
    TaskDone,
)
from tests.unit.node_core.driver import DURATIONS, Driver, microbatch, request

#: A micro-batch of the driver is 16 tokens.
MICROBATCH = 16


def _memory(budget: int, **more: object) -> MemoryConfig:
    given = {"kv_bytes_per_token": 1, "activation_bytes_per_token": 1, "kappa": 1.0, "max_wait_s": 0.5} | more
    given.setdefault("max_forward_wait_s", given["max_wait_s"])
    return MemoryConfig(peak_bytes=budget, **given)  # type: ignore[arg-type]


def _counters(driver: Driver) -> MemoryCounters:
    counters = driver.core.snapshot().memory
    assert counters is not None
    return counters


def _moves(driver: Driver, stage: int = 0) -> list[tuple[float, str, tuple[str, ...], int]]:
    return [
        (time_s, str(op.kind), op.task_ids, op.num_bytes)
        for time_s, where, op in driver.runs
        if where == stage and op.kind in MOVES
    ]


def test_what_fits_never_waits_or_moves() -> None:
    driver = Driver(num_stages=2, memory=_memory(1000)).at(0.0, *[request(f"r{i}", max_tokens=4) for i in range(4)])
    plain = Driver(num_stages=2).at(0.0, *[request(f"r{i}", max_tokens=4) for i in range(4)])
    for one in (driver, plain):
        one.at(0.0, *[microbatch(f"m{i}", accumulation=2) for i in range(6)]).run()
    assert driver.log == plain.log
    assert _counters(driver) == MemoryCounters((0, 0), (0, 0))
    assert plain.core.snapshot().memory is None


def test_an_op_waits_until_another_task_has_freed_its_memory() -> None:
    """Forward 0.2 s and backward 0.4 s per stage: m0 has left stage 0 after 1.2 s."""
    driver = Driver(num_stages=2, memory=_memory(MICROBATCH, max_wait_s=5.0))
    driver.at(0.0, microbatch("m0", accumulation=2), microbatch("m1", accumulation=2)).run()
    assert driver.order() == "FBFBS"
    assert driver.ops(OpKind.TRAIN_FORWARD)[1][0] == pytest.approx(1.2)
    counters = _counters(driver)
    assert (counters.waits, counters.offloads) == (1, 0)
    assert counters.waited_s == pytest.approx(1.0)


def test_after_the_longest_wait_others_are_offloaded_and_come_back_before_their_next_use() -> None:
    """gpipe on one stage: the second forward waits in vain for the first backward, which waits for it."""
    driver = Driver(num_stages=1, training_schedule="gpipe", memory=_memory(MICROBATCH))
    driver.at(0.0, microbatch("m0", accumulation=2), microbatch("m1", accumulation=2)).run()
    assert driver.order() == "FoFBrBS"
    assert [op.task_ids[0] for _, op in driver.ops(OpKind.TRAIN_BACKWARD)] == ["m1", "m0"], "m1 is there already"
    assert driver.results == {"m0": "trained", "m1": "trained"}
    assert [move[1:] for move in _moves(driver)] == [
        ("offload", ("m0",), MICROBATCH),
        ("reload", ("m0",), MICROBATCH),
    ]
    assert _moves(driver)[0][0] == pytest.approx(0.2 + 0.5)


def test_training_forwards_wait_longer_than_what_somebody_waits_for() -> None:
    """gpipe on one stage: m1's forward waits 3 s in vain; the request has waited as long as it may before that."""
    memory = _memory(MICROBATCH, max_wait_s=0.5, max_forward_wait_s=3.0)
    driver = Driver(num_stages=1, training_schedule="gpipe", memory=memory)
    driver.at(0.0, microbatch("m0", accumulation=2), microbatch("m1", accumulation=2)).at(1.0, request("r")).run()
    assert driver.order() == "FoPFBrBS"
    assert driver.ops(OpKind.PREFILL)[0][0] == pytest.approx(1.0 + 0.5 + DURATIONS[OpKind.OFFLOAD])
    waiting = Driver(num_stages=1, training_schedule="gpipe", memory=memory)
    waiting.at(0.0, microbatch("m0", accumulation=2), microbatch("m1", accumulation=2)).run()
    assert _moves(waiting)[0][0] == pytest.approx(0.2 + 3.0)


def test_a_wake_up_ends_the_wait_without_any_other_event() -> None:
    core = NodeCore(NodeCoreConfig(num_stages=1, training_schedule="gpipe", memory=_memory(MICROBATCH)))
    for name in ("m0", "m1"):
        core.step(0.0, microbatch(name, accumulation=2))
    op = core.snapshot().running_ops[0]
    assert op is not None
    assert core.step(0.2, OpDone(0, op.op_id)) == []
    assert core.next_wakeup_s == pytest.approx(0.7)


def test_the_data_needed_last_goes_first() -> None:
    """Two stages, gpipe: when m3's forward needs room on stage 0, m2 has been used last and comes back last."""
    driver = Driver(num_stages=2, training_schedule="gpipe", memory=_memory(2 * MICROBATCH))
    driver.at(0.0, *[microbatch(f"m{i}", accumulation=3) for i in (1, 2, 3)]).run()
    assert _moves(driver)[0][1:3] == ("offload", ("m2",))
    assert set(driver.results.values()) == {"trained"}


def test_what_is_far_from_its_next_use_goes_before_what_was_used_later() -> None:
    account = NodeMemory(_memory(30), RunningRequests(NodeCoreConfig(num_stages=1)), 1)
    for task_id in ("near", "far", "last"):
        prefill = Op(1, OpKind.PREFILL, (task_id,), 0, 10, batch=1, end_tokens=(10,))
        account.starts(0.0, 0, Flight(prefill, Claim(0.0, 0.0, 1.0)))
    distances = {"near": 1, "far": 5, "last": 2}
    new = Op(2, OpKind.TRAIN_FORWARD, ("m",), 0, 15, batch=1)
    assert account.next_move(0, new, distances.__getitem__) == (OpKind.OFFLOAD, ("far", "last"), 20)
    assert account.next_move(0, new, distances.__getitem__) is None


def test_a_microbatch_that_must_come_down_first_goes_before_a_request_on_the_last_stage() -> None:
    """When "new" needs room on stage 0: m0 waits for its backward on stage 2, where "idle" ends its prefill."""
    driver = Driver(num_stages=3, memory=_memory(30, max_wait_s=0.0), durations=lambda s, o: 1.0)
    driver.at(0.0, microbatch("m0")).at(0.5, request("idle", prompt=5, max_tokens=2, tpot_s=1e3))
    driver.at(3.5, request("new", arrival_s=3.5, deadline_s=3.6)).run()
    assert _moves(driver, 0)[0] == (3.5, "offload", ("m0",), MICROBATCH)


def test_a_request_between_two_tokens_goes_before_a_microbatch_whose_backward_is_next() -> None:
    """On stage 1 of two, when "new" needs room there, stage 0 is busy with "more"."""
    durations = dict.fromkeys(OpKind, 1.0) | {OpKind.OFFLOAD: 0.0, OpKind.TRAIN_FORWARD: 1.5}
    driver = Driver(num_stages=2, memory=_memory(30, max_wait_s=0.0), max_prefill_tokens=1, durations=durations)
    driver.at(0.0, request("idle", prompt=5, max_tokens=2, tpot_s=1e3), microbatch("m0"))
    driver.at(2.2, request("new", deadline_s=2.3, arrival_s=2.2), request("more", prompt=1, deadline_s=2.4)).run()
    assert _moves(driver, 1)[0][1:] == ("offload", ("idle",), 5)


def test_an_op_that_waited_for_room_runs_at_the_version_it_meets() -> None:
    """A step takes place on stage 0 while a prefill waits there, which enters with the new weights."""
    driver = Driver(
        num_stages=2,
        weight_handling="stash",
        gradient_buffers=2,
        memory=_memory(2 * MICROBATCH, max_wait_s=50.0),
        durations=lambda s, o: 1.0,
    )
    driver.at(0.0, microbatch("m0"), microbatch("m1")).at(0.5, request("r", prompt=30, arrival_s=0.5)).run()
    assert driver.order() == "FFBSBPS"
    assert [op.version for _, op in driver.ops(OpKind.PREFILL)] == [1]


def test_a_prefill_takes_no_more_requests_than_fit() -> None:
    driver = Driver(num_stages=1, memory=_memory(50))
    driver.at(0.0, request("busy", prompt=1), *[request(f"r{i}", prompt=20) for i in range(3)]).run()
    assert [op.task_ids for _, op in driver.ops(OpKind.PREFILL)] == [("busy",), ("r0", "r1"), ("r2",)]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 4, 7, 16, 64]),
    st.integers(1, 6),
    st.integers(0, 63),
    st.sampled_from([0, 20]),
    st.booleans(),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=2, max_size=12),
)
def test_short_prompts_that_fill_whole_blocks_fit_together(
    block: int, blocks: int, rest: int, mixed: int, offloads: bool, lengths: list[tuple[int, int]]
) -> None:
    """The checker counts what every op leaves on a stage, in whole blocks."""
    memory = _memory(blocks * block + rest % block, wait_or_offload=offloads)
    driver = Driver(num_stages=2, kv_block_tokens=block, max_batch_tokens=mixed, memory=memory)
    driver.at(0.0, *[request(f"r{i}", prompt, tokens) for i, (prompt, tokens) in enumerate(lengths)]).run()
    fits = [-(-(prompt + tokens) // block) <= blocks for prompt, tokens in lengths]
    ends = [driver.results[f"r{i}"] for i in range(len(lengths))]
    if offloads:
        assert ends == ["length" if one else "error" for one in fits]
    assert _counters(driver).used_bytes == (0, 0)


def test_requests_that_come_do_not_shorten_the_wait_of_one_before_them() -> None:
    driver = Driver(num_stages=1, training_schedule="gpipe", memory=_memory(MICROBATCH + 2))
    driver.at(0.0, microbatch("m0", accumulation=2))
    driver.at(0.1, request("a", prompt=5, arrival_s=0.1)).at(0.3, request("b", prompt=5)).run()
    assert driver.ops(OpKind.PREFILL)[0][0] == pytest.approx(0.2 + 0.5 + DURATIONS[OpKind.OFFLOAD])


def test_serving_pushes_training_out_and_not_itself() -> None:
    """The micro-batch comes back through stage 0 only after its backward on stage 1."""
    driver = Driver(num_stages=2, memory=_memory(40, max_wait_s=0.0), durations=lambda s, o: 1.0)
    driver.at(0.0, microbatch("m0")).at(1.5, request("long", prompt=30, arrival_s=1.5)).run()
    assert _moves(driver, 0)[0][1:] == ("offload", ("m0",), MICROBATCH)
    assert driver.results == {"m0": "trained", "long": "length"}


def test_growing_contexts_are_accounted_for_token_by_token() -> None:
    driver = Driver(num_stages=1, memory=_memory(100)).at(0.0, request("r", prompt=10, max_tokens=5)).run(until_s=0.05)
    held = []
    while driver._events:
        held.append(_counters(driver).used_bytes[0])
        driver.run(until_s=driver._events[0][0])
    assert held == [10, 11, 12, 13, 14]
    assert _counters(driver).used_bytes == (0,)


def test_requests_beyond_the_device_take_turns_through_host_memory() -> None:
    """Three contexts of 20 to 24 bytes on a device of 50: every decode iteration holds two of them."""
    driver = Driver(num_stages=1, memory=_memory(50, max_wait_s=0.01))
    driver.at(0.0, *[request(f"r{i}", prompt=20, max_tokens=5) for i in range(3)]).run()
    assert set(driver.results.values()) == {"length"}
    assert all(len(op.task_ids) <= 2 for _, op in driver.ops(OpKind.DECODE))
    counters = _counters(driver)
    assert counters.offloaded_bytes == counters.reloaded_bytes > 0
    assert counters.host_bytes == (0,)


@pytest.mark.parametrize(
    ("event", "detail"),
    [
        (request("x", prompt=30, max_tokens=11), "needs 41 bytes on every stage, which may hold 40"),
        (microbatch("x"), "needs 48 bytes on every stage, which may hold 40"),
    ],
)
def test_what_can_never_fit_fails_alone_with_the_numbers(event: object, detail: str) -> None:
    driver = Driver(num_stages=2, memory=_memory(40, activation_bytes_per_token=3))
    driver.at(0.0, request("ok", max_tokens=3)).at(0.01, event).run()  # type: ignore[arg-type]
    assert driver.results == {"ok": "length", "x": "error"}
    assert driver.details["x"] == detail
    assert _counters(driver).failures == 1


def test_without_wait_or_offload_what_does_not_fit_now_fails_at_once_with_the_numbers() -> None:
    driver = Driver(num_stages=1, training_schedule="gpipe", memory=_memory(20, wait_or_offload=False))
    driver.at(0.0, microbatch("m0", accumulation=2), microbatch("m1", accumulation=2)).run()
    assert driver.results == {"m0": "trained", "m1": "error"}
    assert driver.details["m1"] == "train_forward needs 16 bytes on stage 0, which holds 16 of 20"
    assert not _moves(driver)


def test_a_failure_lets_others_in_at_once() -> None:
    """When "a" fails on stage 0, "b" gets its place in the KV cache and fits; nothing else happens until then."""
    driver = Driver(num_stages=2, memory=_memory(20, wait_or_offload=False), kv_capacity_tokens=9)
    driver.at(0.0, microbatch("m0")).at(0.3, request("a", prompt=8, deadline_s=0.5), request("b", prompt=4)).run()
    assert driver.results == {"m0": "trained", "a": "error", "b": "length"}
    assert driver.ops(OpKind.PREFILL)[0][0] == 0.3


def test_a_cancelled_task_that_waits_for_room_or_is_offloaded_leaves_nothing() -> None:
    for at_s in (0.3, 0.71, 0.75):
        for name in ("m0", "m1"):
            driver = Driver(num_stages=1, training_schedule="gpipe", memory=_memory(MICROBATCH), group_timeout_s=0.1)
            driver.at(0.0, microbatch("m0", accumulation=2), microbatch("m1", accumulation=2))
            driver.at(at_s, Cancelled(name)).run()
            other = {"m0": "m1", "m1": "m0"}[name]
            assert driver.results == {name: "cancelled", other: "trained"}
            assert _counters(driver).used_bytes == _counters(driver).host_bytes == (0,)


@pytest.mark.parametrize("kind", sorted(MOVES))
def test_when_data_cannot_be_moved_the_op_that_needed_it_fails(kind: OpKind) -> None:
    first = True

    def fails(stage: int, op: Op) -> bool:
        nonlocal first
        failing, first = first and op.kind is kind, first and op.kind is not kind
        return failing

    driver = Driver(num_stages=1, training_schedule="gpipe", memory=_memory(MICROBATCH), fail=fails)
    driver.at(0.0, microbatch("m0", accumulation=2), microbatch("m1", accumulation=2)).run()
    assert sorted(driver.results.values()) == ["error", "trained"]


def test_a_redelivered_request_is_not_refused() -> None:
    core = NodeCore(NodeCoreConfig(num_stages=1, memory=_memory(40)))
    assert isinstance(core.step(0.0, request("r"))[0], RunOp)
    assert core.step(0.0, request("r", prompt=100)) == []
    assert isinstance(core.step(0.0, request("other", prompt=100))[0], TaskDone)


def _turn(name: str, prompt: int = 10, session_id: str = "s", **more: float) -> RequestArrived:
    return request(name, prompt=prompt, max_tokens=3, session_id=session_id, **more)


def _kept(budget: int, **config: object) -> Driver:
    """After two turns of 12 tokens each, kept for "s" and "u"; nothing may wait."""
    driver = Driver(prefix_cache_tokens=100, memory=_memory(budget, max_wait_s=9.0), **{"num_stages": 1} | config)
    return driver.at(0.0, _turn("a")).at(1.0, _turn("b", session_id="u")).run()


def test_a_kept_prefix_stays_on_the_account_and_is_handed_over() -> None:
    driver = _kept(100, num_stages=2)
    assert _counters(driver).used_bytes == (24, 24)
    driver.at(2.0, _turn("c", 15)).run()
    assert driver.ops(OpKind.PREFILL)[-1][1].cached_tokens == (12,)
    assert _counters(driver).used_bytes == (12 + 17, 12 + 17)
    assert _counters(driver).waits == 0


def test_a_turn_whose_prompt_is_shorter_than_what_is_kept_holds_less() -> None:
    driver = _kept(100).at(2.0, _turn("c", 5)).run()
    assert _counters(driver).used_bytes == (12 + 7,)


@pytest.mark.parametrize(("prompt", "kept"), [(14, ["a", "b"]), (16, ["b"]), (26, ["b"]), (30, [])])
def test_kept_prefixes_go_before_anything_waits_or_moves_and_no_more_than_must(prompt: int, kept: list[str]) -> None:
    driver = _kept(40).at(2.0, request("r", prompt=prompt, max_tokens=2, arrival_s=2.0)).run()
    assert driver.ops(OpKind.PREFILL)[-1][0] == 2.0
    assert driver.order() == "PDD" * 2 + "PD"
    assert list(driver.checker.kept) == kept
    assert (_counters(driver).waits, _counters(driver).used_bytes) == (0, (12 * len(kept),))


def test_a_forward_makes_kept_prefixes_go_too() -> None:
    driver = _kept(30).at(2.0, microbatch("m")).run()
    assert driver.ops(OpKind.TRAIN_FORWARD)[0][0] == 2.0
    assert list(driver.checker.kept) == ["b"]
    assert _counters(driver).waits == 0


def test_kept_prefixes_go_even_where_nothing_waits_or_moves() -> None:
    driver = Driver(num_stages=1, prefix_cache_tokens=100, memory=_memory(24, wait_or_offload=False))
    driver.at(0.0, _turn("a")).at(1.0, request("r", prompt=20, max_tokens=2, arrival_s=1.0)).run()
    assert driver.results == {"a": "length", "r": "length"}
    assert not driver.checker.kept


def test_what_a_turn_goes_on_from_comes_back_from_host_memory() -> None:
    """While the last op of "a" is on stage 1, "r" pushes it out of stage 0; and fails there, so that it stays kept."""
    driver = Driver(
        num_stages=2,
        prefix_cache_tokens=100,
        memory=_memory(30, max_wait_s=0.0),
        durations=lambda stage, op: 1.0,
        fail=lambda stage, op: op.task_ids == ("r",),
    )
    driver.at(0.0, _turn("a")).at(5.5, request("r", prompt=20, arrival_s=5.5)).at(9.0, _turn("c", 14)).run()
    assert [move[1:] for move in _moves(driver)] == [("offload", ("a",), 12), ("reload", ("a",), 12)]
    assert _moves(driver, 1) == []
    assert driver.results == {"a": "length", "r": "error", "c": "length"}
    assert driver.ops(OpKind.PREFILL)[-1][1].continued == ("a",)


def test_a_cancelled_turn_frees_what_it_would_have_gone_on_from() -> None:
    """Its prompt is begun, but no op has had room for what is kept beside the decoding request."""
    driver = Driver(num_stages=1, prefix_cache_tokens=100, max_batch_tokens=20, memory=_memory(30))
    driver.at(0.0, _turn("a")).at(1.0, request("r", prompt=20, max_tokens=9, arrival_s=1.0))
    driver.at(1.12, _turn("c", 14, arrival_s=1.12)).at(1.2, Cancelled("c")).run()
    assert driver.results == {"a": "length", "r": "length", "c": "cancelled"}
    assert _counters(driver).used_bytes == _counters(driver).host_bytes == (0,)


def test_kept_prefixes_stay_on_the_account_under_another_queue_order() -> None:
    driver = _kept(40)
    core = driver.core.with_order(driver.core.config.ordered(QueueOrder.FIFO))
    assert core.snapshot().memory == driver.core.snapshot().memory
    core.step(5.0, request("r", prompt=30, max_tokens=2))
    assert core.snapshot().kv_kept_tokens == 0


def test_the_budget_is_a_share_of_the_peak() -> None:
    assert _memory(1000, kappa=0.9).budget_bytes == 900


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peak_bytes", 0),
        ("kv_bytes_per_token", 0),
        ("activation_bytes_per_token", 0),
        ("kappa", 1.1),
        ("max_wait_s", -1),
        ("max_forward_wait_s", -1),
    ],
)
def test_a_senseless_memory_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        _memory(10, **{field: value}) if field != "peak_bytes" else _memory(0)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="training_schedule"):
        NodeCoreConfig(num_stages=1, training_schedule="2f2b")
