"""Random operation sequences: Redis does what the in-memory ledger does."""

import asyncio
from dataclasses import dataclass, field

import pytest
import redis.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.ledger import Delivery, Ledger, StaleToken, TaskRecord, TaskState
from services.ledger.memory import MemoryLedger, MemoryStore
from services.ledger.redis import RedisLedger
from tests.contract.items import cancelled, outcome, request

TASKS = st.sampled_from(["t0", "t1", "t2"])
NODES = st.sampled_from(["n0", "n1"])
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), TASKS),
        st.tuples(st.just("assign"), TASKS, NODES, st.booleans()),
        st.tuples(st.just("close"), TASKS, st.booleans()),
        st.tuples(st.just("take_back"), NODES),
        st.tuples(st.just("finish"), TASKS, NODES, st.booleans()),
        st.tuples(st.just("read_global"), st.integers(1, 3)),
        st.tuples(st.just("read_node"), NODES, st.integers(1, 3)),
        st.tuples(
            st.just("restart_reader"),
        ),
        st.tuples(
            st.just("lead"),
        ),
    ),
    max_size=25,
)


@dataclass
class Run:
    """One store under test. Entry ids differ between stores, so they are kept here and never compared."""

    ledger: Ledger
    reader: Ledger
    token: int = 0
    entries: dict[tuple[str, str], str] = field(default_factory=dict)

    async def apply(self, operation: tuple[object, ...]) -> object:
        """What the caller of this operation sees."""
        match operation:
            case ("submit", str(task)):
                return await self.ledger.submit(request(task))
            case ("assign", str(task), str(node), bool(stale)):
                try:
                    return await self.ledger.assign(
                        request(task), node, entry_id=None, token=self.token - (1 if stale else 0)
                    )
                except StaleToken:
                    return "stale"
            case ("close", str(task), bool(forget)):
                return await self.ledger.close_task(outcome(task), entry_id=None, forget=forget)
            case ("take_back", str(node)):
                return [item.task_id for item in await self.ledger.take_back(node, token=self.token)]
            case ("finish", str(task), str(node), bool(well)):
                entry = self.entries.get((node, task))
                end = outcome if well else cancelled
                return entry and await self.reader.finish(node, entry, end(task, node))
            case ("read_global", int(count)):
                return self.seen("", await self.reader.read_global(count=count, block_s=0))
            case ("read_node", str(node), int(count)):
                return self.seen(node, await self.reader.read_node(node, count=count, block_s=0))
            case ("lead",):
                self.token = await self.ledger.acquire_leadership()
        return None

    def seen(self, reader: str, deliveries: list[Delivery]) -> list[tuple[str, bool]]:
        """Ids read, the entries remembered."""
        self.entries |= {(reader, delivery.item.task_id): delivery.entry_id for delivery in deliveries}
        return [(delivery.item.task_id, delivery.redelivered) for delivery in deliveries]

    async def state(self) -> object:
        """Everything that can be asked."""
        records: list[TaskRecord | None] = [await self.ledger.record(task) for task in ("t0", "t1", "t2")]
        held = {node: [item.task_id for item in await self.ledger.unfinished(node)] for node in ("n0", "n1")}
        return records, held, await self.ledger.node_ids(), await self.ledger.newest_token()


async def _compare(url: str, operations: list[tuple[object, ...]]) -> None:
    def open_redis() -> RedisLedger:
        return RedisLedger(url, operation_timeout_s=5.0, result_ttl_s=60.0, retention_s=60.0)

    store = MemoryStore()

    def open_memory() -> MemoryLedger:
        return MemoryLedger(store, result_ttl_s=60.0, retention_s=60.0)

    async with redis.asyncio.Redis.from_url(url) as client:
        await client.flushall()
    real_side, model = Run(open_redis(), open_redis()), Run(open_memory(), open_memory())
    try:
        for operation in operations:
            if operation[0] == "restart_reader":
                await real_side.reader.close()
                real_side.reader, model.reader = open_redis(), open_memory()
            assert await real_side.apply(operation) == await model.apply(operation), operation
            assert await real_side.state() == await model.state(), operation
        await _check_conservation(real_side)
    finally:
        await real_side.ledger.close()
        await real_side.reader.close()


async def _check_conservation(run: Run) -> None:
    """Every accepted task is in exactly the place its state names."""
    await run.reader.close()
    held = {node: [item.task_id for item in await run.ledger.unfinished(node)] for node in ("n0", "n1")}
    for task in ("t0", "t1", "t2"):
        record = await run.ledger.record(task)
        holders = [node for node, tasks in held.items() if task in tasks]
        is_assigned = record is not None and record.state is TaskState.ASSIGNED
        assert holders == ([record.node_id] if record is not None and is_assigned else [])


@pytest.fixture(scope="session")
def redis_url(base_url: str) -> str:
    """Only the real servers."""
    if base_url == "memory://":
        pytest.skip("the model itself")
    return base_url


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS)
def test_redis_does_what_the_model_does(redis_url: str, operations: list[tuple[object, ...]]) -> None:
    asyncio.run(_compare(redis_url, operations))
