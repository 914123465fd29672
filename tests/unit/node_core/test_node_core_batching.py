"""Continuous batching and admission by KV cache."""

import pytest

from services.latency import OpKind
from services.node_agent.core.memory import KvLedger
from services.node_agent.core.node import NodeCore
from services.node_agent.core.types import NodeCoreConfig, OpDone, QueueOrder, RunOp, TaskDone
from tests.unit.node_core.driver import Driver, request


def test_a_request_gets_a_prefill_and_then_decodes_until_its_length() -> None:
    driver = Driver(num_stages=1).at(0.0, request("a", prompt=7, max_tokens=3)).run()
    assert driver.order() == "PDD"
    assert driver.results == {"a": "length"}
    assert [op.context_tokens for _, op in driver.ops(OpKind.DECODE)] == [8, 9]


def test_a_stopped_request_leaves_at_once_and_its_cache_is_free() -> None:
    driver = Driver(num_stages=1, stop_after={"a": 2}).at(0.0, request("a", max_tokens=9)).run()
    assert driver.order() == "PD"
    assert driver.results == {"a": "stop"}
    assert driver.core.snapshot().kv_used_tokens == 0


def test_requests_join_the_running_batch_between_iterations() -> None:
    driver = Driver(num_stages=1).at(0.0, request("a", max_tokens=6)).at(0.12, request("b", max_tokens=3)).run()
    batches = [op.task_ids for _, op in driver.ops(OpKind.DECODE)]
    assert ("a", "b") in batches
    assert batches[0] == ("a",)


def test_prefill_packs_up_to_the_token_budget_and_counts_the_reference() -> None:
    driver = Driver(num_stages=1, max_prefill_tokens=30)
    driver.at(0.0, request("now")).at(
        0.01,
        request("a", prompt=10, reference_tokens=5),
        request("b", prompt=15),
        request("c", prompt=1),
        request("long", prompt=100),
    ).run()
    prefills = [(op.task_ids, op.num_tokens) for _, op in driver.ops(OpKind.PREFILL)]
    assert prefills == [(("now",), 10), (("a", "b"), 30), (("c",), 1), (("long",), 100)]


def test_a_batch_holds_at_most_max_batch_requests_and_running_ones_are_bounded() -> None:
    driver = Driver(num_stages=2, max_batch=2)
    driver.at(0.0, *[request(f"r{i}", max_tokens=5) for i in range(9)])
    most = 0
    while len(driver.results) < 9:
        driver.run(max_events=20_000, until_s=driver._events[0][0])
        most = max(most, driver.core.snapshot().running_requests)
    assert most == 4
    assert max(len(op.task_ids) for _, op in driver.ops(OpKind.DECODE)) == 2


def test_a_request_that_can_never_fit_ends_at_once_with_the_numbers() -> None:
    core = NodeCore(NodeCoreConfig(num_stages=1, kv_capacity_tokens=20))
    assert core.step(0.0, request("a", prompt=15, max_tokens=6)) == [
        TaskDone("a", "error", "needs 21 KV tokens, the node holds 20")
    ]
    assert core.tasks() == ()


def test_what_a_request_holds_is_whole_blocks() -> None:
    """Of 40 tokens 32 are whole blocks; 17 tokens take two of them."""
    config = NodeCoreConfig(num_stages=1, kv_capacity_tokens=40, kv_block_tokens=16)
    core = NodeCore(config)
    assert core.step(0.0, request("a", prompt=30, max_tokens=3)) == [
        TaskDone("a", "error", "needs 48 KV tokens, the node holds 32")
    ]
    core.step(0.0, request("b", prompt=10, max_tokens=7))
    core.step(0.0, request("c", prompt=1, max_tokens=1))
    state = core.snapshot()
    assert (state.kv_used_tokens, state.kv_capacity_tokens, state.waiting_requests) == (32, 32, 1)


def test_requests_are_admitted_until_the_cache_is_exactly_full() -> None:
    driver = Driver(num_stages=2, kv_capacity_tokens=40).at(0.0, request("a", prompt=10, max_tokens=10))
    driver.at(0.01, request("b", prompt=9, max_tokens=10), request("c", prompt=1, max_tokens=1)).run(until_s=0.15)
    assert driver.core.snapshot().kv_used_tokens == 39
    assert driver.core.snapshot().waiting_requests == 1
    assert set(driver.run().results) == {"a", "b", "c"}


def test_a_request_waits_for_cache_and_small_ones_overtake_it_a_bounded_number_of_times() -> None:
    driver = Driver(num_stages=1, kv_capacity_tokens=100, max_bypass=3, max_batch=1)
    driver.at(0.0, request("running", prompt=10, max_tokens=40)).at(0.01, request("large", prompt=80, max_tokens=5))
    driver.at(0.02, *[request(f"small{i}", prompt=10, max_tokens=2, arrival_s=0.02) for i in range(8)])
    driver.run()
    order = [task_id for _, op in driver.ops(OpKind.PREFILL) for task_id in op.task_ids]
    assert order.index("large") <= 1 + 3
    assert len(driver.results) == 10


def test_overtaking_is_used_while_the_large_request_cannot_run() -> None:
    driver = Driver(num_stages=2, kv_capacity_tokens=100, max_bypass=3)
    driver.at(0.0, request("running", prompt=10, max_tokens=40)).at(0.01, request("large", prompt=80, max_tokens=5))
    driver.at(0.02, *[request(f"small{i}", prompt=10, max_tokens=2, arrival_s=0.02) for i in range(8)]).run()
    order = [task_id for _, op in driver.ops(OpKind.PREFILL) for task_id in op.task_ids]
    assert order[:5] == ["running", "small0", "small1", "small2", "large"]


def test_earliest_deadline_is_admitted_first_and_broken_promises_let_others_pass() -> None:
    driver = Driver(num_stages=1, max_batch=1, max_demotion_s=1.0)
    driver.at(0.0, request("first", max_tokens=2))
    driver.at(
        0.01,
        request("loose", deadline_s=5.0),
        request("tight", deadline_s=1.0),
        request("broken", deadline_s=0.005),
        request("long_broken", deadline_s=-2.0),
    ).run()
    order = [op.task_ids[0] for _, op in driver.ops(OpKind.PREFILL)]
    assert order == ["first", "long_broken", "tight", "loose", "broken"]


def test_fifo_admits_by_arrival_whatever_the_deadline() -> None:
    driver = Driver(num_stages=1, max_batch=1, queue_order=QueueOrder.FIFO)
    driver.at(0.0, request("a")).at(0.01, request("b", deadline_s=9.0), request("c", deadline_s=0.1)).run()
    assert [op.task_ids[0] for _, op in driver.ops(OpKind.PREFILL)] == ["a", "b", "c"]


def test_groups_follow_each_other_through_the_pipeline() -> None:
    driver = Driver(num_stages=2, max_batch=2).at(0.0, *[request(f"r{i}", max_tokens=20) for i in range(4)]).run()
    starts = {stage: driver.ops(OpKind.DECODE, stage) for stage in (0, 1)}
    overlapping = [t for t, _ in starts[0] if any(u <= t < u + 0.05 for u, _ in starts[1])]
    assert len(overlapping) > 30
    assert driver.now_s < 2 * 19 * 0.05 + 0.5


def test_a_straggler_merges_with_the_group_instead_of_travelling_alone() -> None:
    driver = Driver(num_stages=2).at(0.0, *[request(f"r{i}", max_tokens=30) for i in range(8)])
    driver.at(0.5, request("late", max_tokens=20)).run()
    sizes = [len(op.task_ids) for time_s, op in driver.ops(OpKind.DECODE) if time_s > 1.0]
    assert sizes[:10] == [9] * 10


def test_a_live_request_delivered_twice_runs_once() -> None:
    driver = Driver(num_stages=1).at(0.0, request("a", max_tokens=2), request("a", max_tokens=2))
    driver.at(0.05, request("a", max_tokens=2)).run()
    assert driver.order() == "PD"


def test_kv_ledger_refuses_too_much_and_double_release() -> None:
    ledger = KvLedger(10)
    ledger.reserve("a", 6)
    with pytest.raises(ValueError, match="cannot reserve 5 KV tokens"):
        ledger.reserve("b", 5)
    twin = ledger.fork()
    ledger.release("a")
    assert (ledger.used_tokens, twin.used_tokens) == (0, 6)
    with pytest.raises(KeyError):
        ledger.release("a")


def test_an_unknown_op_end_is_refused_and_changes_nothing() -> None:
    core = NodeCore(NodeCoreConfig(num_stages=2))
    (command,) = core.step(0.0, request("a"))
    assert isinstance(command, RunOp)
    for event in (OpDone(0, 99), OpDone(1, command.op.op_id), OpDone(2, 1), OpDone(-1, 1)):
        before = core.snapshot()
        with pytest.raises(ValueError, match=f"op {event.op_id} ended on stage"):
            core.step(0.1, event)
        assert core.snapshot() == before
