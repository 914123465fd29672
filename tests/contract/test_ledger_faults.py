"""A server that is away, comes back, or answers too late."""

import asyncio
import socket

import pytest
import redis.asyncio

from deploy.local.redis_server import LocalRedis
from services.ledger import LedgerUnavailable, TaskRecord, TaskState, open_ledger
from services.ledger.redis import RedisLedger, redacted
from tests.contract.items import example, outcome, request


async def test_accepted_work_survives_a_restart_and_readers_reconnect(own_server: LocalRedis) -> None:
    ledger = await open_ledger(own_server.url, operation_timeout_s=5.0)
    token = await ledger.acquire_leadership()
    for name in ("waiting", "held", "done"):
        await ledger.submit(request(name))
    assert len(await ledger.read_global(count=10, block_s=0)) == 3
    for name in ("held", "done"):
        await ledger.assign(request(name), "n0", entry_id=None, token=token)
    held, done = await ledger.read_node("n0", count=10, block_s=0)
    await ledger.finish("n0", done.entry_id, outcome("done", "n0"))

    own_server.stop()
    own_server.start()

    assert await ledger.record("waiting") == TaskRecord(TaskState.WAITING)
    assert await ledger.record("done") == TaskRecord(TaskState.DONE, "n0", outcome("done", "n0"))
    assert await ledger.newest_token() == token
    assert await ledger.finish("n0", held.entry_id, outcome("held", "n0"))
    successor = await open_ledger(own_server.url, operation_timeout_s=5.0)
    again = await successor.read_global(count=10, block_s=0)
    assert [(delivery.item.task_id, delivery.redelivered) for delivery in again] == [("waiting", True)]
    await ledger.close()
    await successor.close()


async def test_a_blocking_read_goes_on_after_a_crash_of_the_server(own_server: LocalRedis) -> None:
    ledger = await open_ledger(own_server.url, operation_timeout_s=5.0)
    reading = asyncio.create_task(ledger.read_global(count=1, block_s=5.0))
    await ledger.submit(request("a"))
    assert [delivery.item.task_id for delivery in await reading] == ["a"]
    reading = asyncio.create_task(ledger.read_global(count=1, block_s=5.0))
    await asyncio.sleep(0)
    await asyncio.to_thread(own_server.stop)
    await asyncio.to_thread(own_server.start)
    # Read before the crash and never moved, so it comes again.
    assert [delivery.item.task_id for delivery in await reading] == ["a"]
    await ledger.close()


async def test_an_emptied_server_is_used_again(own_server: LocalRedis) -> None:
    ledger = await open_ledger(own_server.url, operation_timeout_s=5.0)
    assert await ledger.read_global(count=1, block_s=0) == []
    async with asyncio.timeout(5.0):
        await asyncio.to_thread(_flush, own_server.port)
        await ledger.submit(request("a"))
        found = await ledger.read_global(count=1, block_s=1.0)
    assert [delivery.item.task_id for delivery in found] == ["a"]
    await ledger.close()


def _flush(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=5.0) as connection:
        connection.sendall(b"FLUSHALL\r\n")
        assert connection.recv(64) == b"+OK\r\n"


async def test_a_stopped_server_is_reported_within_the_bound(own_server: LocalRedis) -> None:
    ledger = await open_ledger(own_server.url, operation_timeout_s=0.3)
    own_server.stop()
    async with asyncio.timeout(3.0):
        with pytest.raises(LedgerUnavailable, match=f"127.0.0.1:{own_server.port}"):
            await ledger.submit(request("a"))
        with pytest.raises(LedgerUnavailable):
            await ledger.read_global(count=1, block_s=0.1)
    await ledger.close()


async def test_opening_names_the_url_without_credentials() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(LedgerUnavailable) as caught:
        await open_ledger(f"redis://user:secret@127.0.0.1:{port}/0", operation_timeout_s=0.2)
    assert f"redis://127.0.0.1:{port}/0" in str(caught.value)
    assert "Connect call failed" in str(caught.value)  # why, not only that
    assert "secret" not in str(caught.value)


async def test_a_server_that_accepts_and_never_answers_is_reported_within_the_bound() -> None:
    left = asyncio.Event()

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        await writer.wait_closed()
        left.set()

    server = await asyncio.start_server(mute, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    ledger = RedisLedger(f"redis://127.0.0.1:{port}/0", operation_timeout_s=0.2, result_ttl_s=1.0, retention_s=1.0)
    async with asyncio.timeout(3.0):
        with pytest.raises(LedgerUnavailable):
            await ledger.ping()
        await left.wait()  # nothing of it stays connected
    await ledger.close()
    server.close()
    await server.wait_closed()


async def test_another_kind_of_url_is_refused() -> None:
    with pytest.raises(ValueError, match="http"):
        await open_ledger("http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://u:p@host:1/2", "redis://host:1/2"),
        ("rediss://:p@host/0", "rediss://host/0"),
        ("redis://host:1", "redis://host:1"),
        ("redis://host:1/0?password=p", "redis://host:1/0"),
    ],
)
def test_credentials_are_not_shown(url: str, shown: str) -> None:
    assert redacted(url) == shown


async def test_feedback_without_an_id_leaves_no_key_for_the_retention(own_server: LocalRedis) -> None:
    ledger = await open_ledger(own_server.url, operation_timeout_s=1.0, retention_s=3600.0)
    await ledger.append_feedback("f", example(1), "")
    await ledger.append_feedback("f", example(2), "named")
    async with redis.asyncio.Redis.from_url(own_server.url) as client:
        left_s = sorted([await client.ttl(key) async for key in client.scan_iter("{lemix}:feedback:*")])
    assert left_s[0] <= 10
    assert left_s[1] > 3500
    await ledger.close()
