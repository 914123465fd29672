"""What every ledger promises about work."""

import asyncio

import pytest

from services.ledger import Delivery, Ledger, StaleToken, TaskRecord, TaskState
from tests.contract.items import cancelled, microbatch, outcome, request
from tests.contract.stores import Store, gone


async def read_all(ledger: Ledger, node_id: str | None = None) -> list[Delivery]:
    """Everything there is to read now."""
    found: list[Delivery] = []
    while True:
        if node_id is None:
            batch = await ledger.read_global(count=10, block_s=0)
        else:
            batch = await ledger.read_node(node_id, count=10, block_s=0)
        if not batch:
            return found
        found += batch


def ids(deliveries: list[Delivery]) -> list[str]:
    return [delivery.item.task_id for delivery in deliveries]


async def test_a_submitted_task_waits_and_is_read_once(ledger: Ledger) -> None:
    assert await ledger.submit(request("a", (5, 6))) is None
    assert await ledger.record("a") == TaskRecord(TaskState.WAITING)
    (delivery,) = await read_all(ledger)
    assert delivery.item == request("a", (5, 6))
    assert not delivery.redelivered
    assert await read_all(ledger) == []


async def test_submit_is_idempotent_by_task_id(ledger: Ledger) -> None:
    await ledger.submit(request("a", (1,)))
    assert await ledger.submit(request("a", (2,))) == TaskRecord(TaskState.WAITING)
    (delivery,) = await read_all(ledger)
    assert list(delivery.item.inference.prompt_token_ids) == [1]


async def test_a_repeated_submit_tells_the_node_and_then_the_outcome(ledger: Ledger) -> None:
    token = await ledger.acquire_leadership()
    await ledger.submit(request("a"))
    await ledger.assign(request("a"), "n0", entry_id=None, token=token)
    assert await ledger.submit(request("a")) == TaskRecord(TaskState.ASSIGNED, "n0")
    (delivery,) = await ledger.read_node("n0", count=1, block_s=0)
    await ledger.finish("n0", delivery.entry_id, outcome("a", "n0"))
    assert await ledger.submit(request("a")) == TaskRecord(TaskState.DONE, "n0", outcome("a", "n0"))
    assert await read_all(ledger) == []


async def test_a_request_cancelled_on_its_node_may_be_submitted_anew(store: Store) -> None:
    ledger = await store.open()
    token = await ledger.acquire_leadership()
    await ledger.submit(request("a", (1,)))
    await ledger.assign(request("a", (1,)), "n0", entry_id=None, token=token)
    assert await ledger.submit(request("a", (2,))) == TaskRecord(TaskState.ASSIGNED, "n0"), "it has not ended yet"
    (delivery,) = await ledger.read_node("n0", count=1, block_s=0)
    assert await ledger.finish("n0", delivery.entry_id, cancelled("a", "n0"))
    assert await ledger.record("a") == TaskRecord(TaskState.DONE, "n0", cancelled("a", "n0"))
    assert await ledger.submit(request("a", (3,))) is None
    assert await ledger.record("a") == TaskRecord(TaskState.WAITING)
    assert await ledger.submit(request("a", (4,))) == TaskRecord(TaskState.WAITING)
    await ledger.assign(request("a", (3,)), "n0", entry_id=None, token=token)
    assert not await ledger.finish("n0", delivery.entry_id, outcome("a", "n0")), "the entry of the attempt before"
    (again,) = await ledger.read_node("n0", count=1, block_s=0)
    assert await ledger.finish("n0", again.entry_id, outcome("a", "n0"))
    assert await ledger.submit(request("a")) == TaskRecord(TaskState.DONE, "n0", outcome("a", "n0"))


async def test_a_request_cancelled_while_it_waited_may_be_submitted_anew(ledger: Ledger) -> None:
    await ledger.submit(request("a", (1,)))
    await ledger.close_task(cancelled("a"), entry_id=None)
    assert await ledger.record("a") == TaskRecord(TaskState.DONE, "", cancelled("a"))
    assert await ledger.submit(request("a", (2,))) is None
    (delivery,) = await read_all(ledger)
    assert list(delivery.item.inference.prompt_token_ids) == [2]


async def test_concurrent_submits_of_one_task_are_accepted_once(store: Store) -> None:
    ledgers = [await store.open() for _ in range(4)]
    replies = await asyncio.gather(*(ledger.submit(request("a")) for ledger in ledgers for _ in range(5)))
    assert sum(reply is None for reply in replies) == 1
    assert ids(await read_all(ledgers[0])) == ["a"]


async def test_a_move_leaves_the_task_in_exactly_one_stream(store: Store) -> None:
    scheduler = await store.open()
    token = await scheduler.acquire_leadership()
    await scheduler.submit(request("a"))
    (delivery,) = await read_all(scheduler)
    moved = delivery.item
    moved.fencing_token = token
    assert await scheduler.assign(moved, "n0", entry_id=delivery.entry_id, token=token)
    assert await read_all(await store.open()) == []
    (at_node,) = await read_all(await store.open(), "n0")
    assert at_node.item.fencing_token == token
    assert await scheduler.record("a") == TaskRecord(TaskState.ASSIGNED, "n0")


async def test_the_global_entry_goes_although_its_id_is_unknown(store: Store) -> None:
    scheduler = await store.open()
    token = await scheduler.acquire_leadership()
    await scheduler.submit(request("a"))
    assert await scheduler.assign(request("a"), "n0", entry_id=None, token=token)
    assert await read_all(await store.open()) == []


async def test_assigning_again_to_the_same_node_adds_nothing(ledger: Ledger) -> None:
    token = await ledger.acquire_leadership()
    assert await ledger.assign(microbatch("j", 0), "n0", entry_id=None, token=token)
    assert await ledger.assign(microbatch("j", 0), "n0", entry_id=None, token=token)
    assert ids(await read_all(ledger, "n0")) == ["j/0"]


async def test_a_task_held_by_one_node_cannot_go_to_another(ledger: Ledger) -> None:
    token = await ledger.acquire_leadership()
    await ledger.assign(microbatch("j", 0), "n0", entry_id=None, token=token)
    assert not await ledger.assign(microbatch("j", 0), "n1", entry_id=None, token=token)
    assert await read_all(ledger, "n1") == []
    assert await ledger.record("j/0") == TaskRecord(TaskState.ASSIGNED, "n0")


async def test_a_finished_task_is_not_assigned(ledger: Ledger) -> None:
    token = await ledger.acquire_leadership()
    await ledger.submit(request("a"))
    await ledger.close_task(outcome("a"), entry_id=None)
    assert not await ledger.assign(request("a"), "n0", entry_id=None, token=token)
    assert await ledger.unfinished("n0") == []
    assert await ledger.node_ids() == []


async def test_only_the_first_finish_counts(ledger: Ledger) -> None:
    token = await ledger.acquire_leadership()
    await ledger.assign(request("a"), "n0", entry_id=None, token=token)
    (delivery,) = await read_all(ledger, "n0")
    results = await asyncio.gather(
        *(ledger.finish("n0", delivery.entry_id, outcome("a", "n0", (number,))) for number in range(8))
    )
    assert sum(results) == 1
    record = await ledger.record("a")
    assert record is not None
    assert record.outcome == outcome("a", "n0", (results.index(True),))
    assert await ledger.unfinished("n0") == []


async def test_finish_by_a_node_that_lost_the_task_is_refused(ledger: Ledger) -> None:
    token = await ledger.acquire_leadership()
    await ledger.assign(request("a"), "n0", entry_id=None, token=token)
    (old,) = await read_all(ledger, "n0")
    await ledger.take_back("n0", token=token)
    assert not await ledger.finish("n0", old.entry_id, outcome("a", "n0"))
    await ledger.assign(request("a"), "n1", entry_id=None, token=token)
    assert not await ledger.finish("n0", old.entry_id, outcome("a", "n0"))
    (new,) = await read_all(ledger, "n1")
    assert await ledger.finish("n1", new.entry_id, outcome("a", "n1"))


async def test_a_task_that_came_back_to_its_node_is_finished_by_the_newer_entry(ledger: Ledger) -> None:
    token = await ledger.acquire_leadership()
    await ledger.assign(request("a"), "n0", entry_id=None, token=token)
    (old,) = await read_all(ledger, "n0")
    await ledger.take_back("n0", token=token)
    await ledger.assign(request("a"), "n0", entry_id=None, token=token)
    (new,) = await read_all(ledger, "n0")
    assert not await ledger.finish("n0", old.entry_id, outcome("a", "n0", (1,)))
    assert await ledger.finish("n0", new.entry_id, outcome("a", "n0", (2,)))


async def test_take_back_returns_unfinished_work_in_order_and_leaves_the_finished(ledger: Ledger) -> None:
    token = await ledger.acquire_leadership()
    for name in ("a", "b", "c"):
        await ledger.submit(request(name))
        await ledger.assign(request(name), "n0", entry_id=None, token=token)
    assert await ledger.node_ids() == ["n0"]
    deliveries = await read_all(ledger, "n0")
    await ledger.finish("n0", deliveries[1].entry_id, outcome("b", "n0"))
    assert [item.task_id for item in await ledger.unfinished("n0")] == ["a", "c"]
    assert [item.task_id for item in await ledger.take_back("n0", token=token)] == ["a", "c"]
    assert await ledger.unfinished("n0") == []
    assert await ledger.node_ids() == []
    assert await ledger.record("a") == TaskRecord(TaskState.WAITING)
    assert ids(await read_all(ledger)) == ["a", "c"]
    assert await ledger.take_back("n0", token=token) == []


async def test_the_micro_batches_of_a_lost_node_can_stay_for_its_return(ledger: Ledger, store: Store) -> None:
    token = await ledger.acquire_leadership()
    for item in (microbatch("j", 0), request("r"), microbatch("j", 1)):
        await ledger.assign(item, "n0", entry_id=None, token=token)
    await read_all(ledger, "n0")
    taken = await ledger.take_back("n0", token=token, keep_training=True)
    assert [item.task_id for item in taken] == ["r"]
    assert await ledger.node_ids() == ["n0"]
    assert await ledger.record("j/1") == TaskRecord(TaskState.ASSIGNED, "n0")
    successor = await store.open()
    deliveries = await read_all(successor, "n0")
    assert ids(deliveries) == ["j/0", "j/1"]
    assert await successor.finish("n0", deliveries[0].entry_id, outcome("j/0", "n0"))
    assert [item.task_id for item in await ledger.take_back("n0", token=token)] == ["j/1"]
    assert await ledger.node_ids() == []


async def test_an_older_token_moves_nothing(store: Store) -> None:
    old, new = await store.open(), await store.open()
    assert await new.newest_token() == 0
    stale = await old.acquire_leadership()
    await old.submit(request("a"))
    await old.submit(request("b"))
    await old.assign(request("a"), "n0", entry_id=None, token=stale)
    fresh = await new.acquire_leadership()
    assert fresh > stale
    assert await old.newest_token() == fresh
    with pytest.raises(StaleToken):
        await old.assign(request("b"), "n0", entry_id=None, token=stale)
    with pytest.raises(StaleToken):
        await old.take_back("n0", token=stale)
    with pytest.raises(StaleToken):
        await old.take_back("empty", token=stale)
    assert await new.record("b") == TaskRecord(TaskState.WAITING)
    assert await new.record("a") == TaskRecord(TaskState.ASSIGNED, "n0")


async def test_a_restarted_scheduler_reads_what_it_had_not_moved_first(store: Store) -> None:
    before = await store.open()
    token = await before.acquire_leadership()
    for name in ("a", "b", "c"):
        await before.submit(request(name))
    assert ids(await read_all(before)) == ["a", "b", "c"]
    await before.assign(request("b"), "n0", entry_id=None, token=token)
    await before.submit(request("d"))

    after = await store.open()
    first = await after.read_global(count=1, block_s=0)
    rest = await read_all(after)
    assert ids(first + rest) == ["a", "c", "d"]
    assert [delivery.redelivered for delivery in first + rest] == [True, True, False]


async def test_what_a_deposed_scheduler_still_read_comes_to_its_successor(store: Store) -> None:
    old, new = await store.open(), await store.open()
    await old.acquire_leadership()
    await new.acquire_leadership()
    assert await read_all(new) == []
    await new.submit(request("a"))
    assert ids(await read_all(old)) == ["a"]
    assert await read_all(new) == []
    new.read_global_again()
    (delivery,) = await read_all(new)
    assert (delivery.item.task_id, delivery.redelivered) == ("a", True)
    assert await read_all(new) == []


async def test_a_restarted_node_reads_its_unfinished_tasks_first(store: Store) -> None:
    scheduler, before = await store.open(), await store.open()
    token = await scheduler.acquire_leadership()
    for name in ("a", "b", "c"):
        await scheduler.assign(request(name), "n0", entry_id=None, token=token)
    first = await before.read_node("n0", count=2, block_s=0)
    await before.finish("n0", first[0].entry_id, outcome("a", "n0"))

    after = await store.open()
    found = await read_all(after, "n0")
    assert [(delivery.item.task_id, delivery.redelivered) for delivery in found] == [("b", True), ("c", False)]
    assert await after.finish("n0", found[0].entry_id, outcome("b", "n0"))


async def test_nodes_do_not_see_each_others_work(ledger: Ledger) -> None:
    token = await ledger.acquire_leadership()
    await ledger.assign(request("a"), "n0", entry_id=None, token=token)
    await ledger.assign(request("b"), "n1", entry_id=None, token=token)
    assert ids(await read_all(ledger, "n1")) == ["b"]
    assert ids(await read_all(ledger, "n0")) == ["a"]
    assert await ledger.node_ids() == ["n0", "n1"]


async def test_a_blocking_read_wakes_on_new_work(store: Store) -> None:
    reader, writer = await store.open(), await store.open()
    reading = asyncio.create_task(reader.read_global(count=10, block_s=5.0))
    await asyncio.sleep(0)
    await writer.submit(request("a"))
    found = await asyncio.wait_for(reading, 2.0) or await read_all(reader)
    assert ids(found) == ["a"]


async def test_a_blocking_node_read_wakes_on_an_assignment(store: Store) -> None:
    node, scheduler = await store.open(), await store.open()
    token = await scheduler.acquire_leadership()
    reading = asyncio.create_task(node.read_node("n0", count=10, block_s=5.0))
    await asyncio.sleep(0)
    await scheduler.assign(request("a"), "n0", entry_id=None, token=token)
    found = await asyncio.wait_for(reading, 2.0) or await read_all(node, "n0")
    assert ids(found) == ["a"]


async def test_a_blocking_read_of_nothing_ends(ledger: Ledger) -> None:
    assert await asyncio.wait_for(ledger.read_global(count=1, block_s=0.02), 2.0) == []


@pytest.mark.parametrize("steps", [*range(12), 20, 30])
async def test_a_cancelled_read_ends_and_loses_nothing(store: Store, steps: int) -> None:
    reader, writer = await store.open(), await store.open()
    reading = asyncio.create_task(reader.read_global(count=10, block_s=5.0))
    submit = asyncio.create_task(writer.submit(request("a")))
    for _ in range(steps):  # cancelled at every point of its way to the server and back
        await asyncio.sleep(0)
    reading.cancel()
    results = await asyncio.wait_for(asyncio.gather(reading, submit, return_exceptions=True), 2.0)
    found = results[0]
    seen = ids(found) if isinstance(found, list) else []  # it had ended before
    assert seen + ids(await read_all(reader)) == ["a"]


async def test_read_takes_no_more_than_asked(ledger: Ledger) -> None:
    for number in range(5):
        await ledger.submit(request(f"t{number}"))
    assert ids(await ledger.read_global(count=2, block_s=0)) == ["t0", "t1"]
    assert ids(await read_all(ledger)) == ["t2", "t3", "t4"]


async def test_closing_is_idempotent_and_does_not_touch_held_work(ledger: Ledger) -> None:
    token = await ledger.acquire_leadership()
    await ledger.submit(request("a"))
    (delivery,) = await read_all(ledger)
    await ledger.close_task(outcome("a", tokens=(1,)), entry_id=delivery.entry_id)
    await ledger.close_task(outcome("a", tokens=(2,)), entry_id=delivery.entry_id)
    assert await ledger.record("a") == TaskRecord(TaskState.DONE, "", outcome("a", tokens=(1,)))
    await ledger.assign(request("b"), "n0", entry_id=None, token=token)
    await ledger.close_task(outcome("b"), entry_id=None)
    assert await ledger.record("b") == TaskRecord(TaskState.ASSIGNED, "n0")


async def test_a_forgotten_task_may_come_again_and_a_finished_one_stays(ledger: Ledger) -> None:
    await ledger.submit(request("a"))
    await ledger.close_task(outcome("a"), entry_id=None, forget=True)
    assert await ledger.record("a") is None
    assert await read_all(ledger) == []
    assert await ledger.submit(request("a")) is None
    await ledger.close_task(outcome("a"), entry_id=None)
    await ledger.close_task(outcome("a"), entry_id=None, forget=True)
    assert await ledger.record("a") == TaskRecord(TaskState.DONE, "", outcome("a"))


async def test_results_expire_and_the_task_may_come_again(store: Store) -> None:
    ledger = await store.open(result_ttl_s=0.03)
    await ledger.submit(request("a"))
    await ledger.close_task(outcome("a"), entry_id=None)
    await gone(lambda: ledger.record("a"))
    assert await ledger.submit(request("a")) is None


async def test_unfinished_work_does_not_expire(store: Store) -> None:
    ledger = await store.open(result_ttl_s=0.02)
    await ledger.submit(request("old"))
    await ledger.submit(request("done"))
    await ledger.close_task(outcome("done"), entry_id=None)
    await gone(lambda: ledger.record("done"))
    assert await ledger.record("old") == TaskRecord(TaskState.WAITING)
    assert ids(await read_all(ledger)) == ["old"]


async def test_what_is_unknown(ledger: Ledger) -> None:
    await ledger.ping()
    assert await ledger.record("nobody") is None
    assert await ledger.node_ids() == []
    assert await ledger.unfinished("nobody") == []
    assert not await ledger.finish("n0", "1", outcome("nobody", "n0"))


async def test_close_may_be_called_twice(store: Store) -> None:
    ledger = await store.open()
    await ledger.close()
    await ledger.close()
