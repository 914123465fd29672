"""One ledger suite, three stores: in memory, Redis 7 and Redis 6.2."""

import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis.asyncio

from deploy.local.redis_server import LocalRedis
from services.ledger import Ledger
from tests.contract.stores import BACKENDS, Store, start_server


@pytest.fixture(scope="session", params=BACKENDS)
def base_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a store that lasts for the session; "memory://" stands for a new one per test."""
    if request.param == "memory":
        yield "memory://"
        return
    server = start_server(request.param, tmp_path_factory.mktemp(request.param))
    yield server.url
    server.stop()


@pytest.fixture
async def store(base_url: str) -> AsyncIterator[Store]:
    """An empty store."""
    url = base_url
    if url == "memory://":
        url += uuid.uuid4().hex
    else:
        async with redis.asyncio.Redis.from_url(url) as client:
            await client.flushall()
    store = Store(url, [])
    yield store
    for ledger in store.opened:
        await ledger.close()


@pytest.fixture
async def ledger(store: Store) -> Ledger:
    """One handle on an empty store."""
    return await store.open()


@pytest.fixture(params=["redis-7", "redis-6.2"])
def own_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalRedis]:
    """A server that the test may stop and start."""
    server = start_server(request.param, tmp_path)
    yield server
    server.stop()
