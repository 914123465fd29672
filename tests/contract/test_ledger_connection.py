"""The connection that all commands of a process share."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import redis.exceptions

from deploy.local.redis_server import LocalRedis
from services.ledger.connection import RedisChannel, RedisConnector

_SCRIPT = "return {KEYS[1], ARGV[1]}"


@pytest.fixture
async def channel(own_server: LocalRedis) -> AsyncIterator[RedisChannel]:
    channel = RedisChannel(RedisConnector(own_server.url, 2.0))
    async with asyncio.timeout(10.0):
        yield channel
        await channel.close()


async def test_callers_at_once_get_their_own_answers(channel: RedisChannel) -> None:
    replies = await asyncio.gather(*(channel.command("ECHO", f"number {index}") for index in range(200)))
    assert replies == [f"number {index}".encode() for index in range(200)]


async def test_an_error_is_its_callers_alone(channel: RedisChannel) -> None:
    await channel.command("SET", "text", "a")
    first, wrong, last = await asyncio.gather(
        channel.command("GET", "text"),
        channel.command("INCR", "text"),
        channel.command("GET", "text"),
        return_exceptions=True,
    )
    assert (first, last) == (b"a", b"a")
    assert isinstance(wrong, redis.exceptions.ResponseError)
    assert "not an integer" in str(wrong)


async def test_who_stops_waiting_leaves_the_others_their_answers(channel: RedisChannel) -> None:
    await channel.command("PING")
    given_up = asyncio.create_task(channel.command("ECHO", "first"))
    kept = asyncio.create_task(channel.command("ECHO", "second"))
    await asyncio.sleep(0)  # both are sent
    given_up.cancel()
    assert await kept == b"second"
    assert given_up.cancelled()


async def test_a_lost_connection_ends_everybodys_wait_and_is_opened_again(
    channel: RedisChannel, own_server: LocalRedis
) -> None:
    number = await channel.command("CLIENT", "ID")
    waiting = [asyncio.create_task(channel.command("BLPOP", "nothing", 0)) for _ in range(3)]
    await asyncio.sleep(0)
    other = RedisChannel(RedisConnector(own_server.url, 2.0))
    assert await other.command("CLIENT", "KILL", "ID", number) == 1
    await other.close()
    for task in waiting:
        with pytest.raises(ConnectionError, match="lost"):
            await task
    assert await channel.command("PING") == b"PONG"


async def test_dropping_gives_up_what_is_on_its_way(channel: RedisChannel) -> None:
    await channel.command("PING")
    waiting = asyncio.create_task(channel.command("BLPOP", "nothing", 0))
    await asyncio.sleep(0)
    channel.drop()
    with pytest.raises(ConnectionError, match="closed"):
        await waiting
    assert await channel.command("PING") == b"PONG"


async def test_commands_beyond_the_bound_are_refused(channel: RedisChannel, monkeypatch: pytest.MonkeyPatch) -> None:
    await channel.command("PING")
    monkeypatch.setattr("services.ledger.connection._MAX_PENDING", 2)
    replies = await asyncio.gather(*(channel.command("ECHO", "x") for _ in range(3)), return_exceptions=True)
    assert replies[:2] == [b"x", b"x"]
    assert isinstance(replies[2], ConnectionError)


async def test_a_script_the_server_does_not_know_is_told_to_it(channel: RedisChannel) -> None:
    for _ in range(2):
        await channel.command("SCRIPT", "FLUSH")
        assert await channel.script(_SCRIPT, ["k"], ["v"]) == [b"k", b"v"]
        assert await channel.script(_SCRIPT, ["k"], ["v"]) == [b"k", b"v"]


async def test_nothing_gets_between_the_commands_of_a_transaction(channel: RedisChannel) -> None:
    both = [channel.transaction(("INCR", "count"), ("INCR", "count")) for _ in range(50)]
    others = [channel.command("INCR", "count") for _ in range(50)]
    mixed = [work for pair in zip(both, others, strict=True) for work in pair]
    pairs = [reply for reply in await asyncio.gather(*mixed) if isinstance(reply, list)]
    assert len(pairs) == 50
    assert all(second == first + 1 for first, second in pairs)


async def test_an_error_inside_a_transaction_is_raised(channel: RedisChannel) -> None:
    await channel.command("SET", "text", "a")
    with pytest.raises(redis.exceptions.ResponseError, match="not an integer"):
        await channel.transaction(("GET", "text"), ("INCR", "text"))
    # A server that still loads its data refuses the commands like this one, and then to execute them.
    with pytest.raises(redis.exceptions.ResponseError, match="wrong number of arguments"):
        await channel.transaction(("GET",))
    assert await channel.command("GET", "text") == b"a"
