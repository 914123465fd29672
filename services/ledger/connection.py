"""One connection to Redis, lean: a command costs a future, not the twenty calls of a general client.

redis-py opens the connection (URL, TLS, AUTH, SELECT); from then on this protocol owns its transport. Commands of all
callers share the connection and are answered in order, so nobody waits for a free one and a turn of the loop that
brings several commands sends them as they come, without waiting for answers in between.
"""

import asyncio
import hashlib
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

import hiredis
import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

#: Commands without an answer on one connection.
_MAX_PENDING: Final = 4096
_INCOMPLETE: Final = object()


class RedisConnection(asyncio.Protocol):
    """Commands and replies in order. Made by `RedisConnector.open`."""

    def __init__(self, opened: "redis.asyncio.Connection", transport: asyncio.Transport) -> None:
        self._opened = opened
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._replies = hiredis.Reader(replyError=_reply_error, notEnoughData=_INCOMPLETE)
        self._pending: deque[asyncio.Future[Any]] = deque()
        self.closed = False
        self._lost = asyncio.Event()

    def send(self, *words: Any) -> "asyncio.Future[Any]":
        """Send one command; the future gets its reply, or ResponseError, or ConnectionError when the connection ends.

        A caller that stops waiting leaves the others alone: its reply is thrown away when it comes.
        """
        return self.send_all((words,))[0]

    def send_all(self, commands: Sequence[Sequence[Any]]) -> "list[asyncio.Future[Any]]":
        """Send commands that nothing comes between."""
        if self.closed:
            raise ConnectionError("the connection is closed")
        if len(self._pending) + len(commands) > _MAX_PENDING:
            raise ConnectionError(f"{_MAX_PENDING} commands wait for their answers")
        futures = [self._loop.create_future() for _ in commands]
        self._transport.write(b"".join(hiredis.pack_command(tuple(command)) for command in commands))
        self._pending.extend(futures)
        return futures

    def close(self) -> None:
        """End the connection and everything that waits for it; idempotent."""
        self._end("the connection was closed")
        self._transport.abort()  # without waiting for a server that takes nothing

    async def wait_closed(self) -> None:
        """Return when the socket of a closed connection is gone: in the loop's next turn."""
        await self._lost.wait()

    def data_received(self, data: bytes) -> None:
        """Replies came."""
        try:
            self._replies.feed(data)
            while (reply := self._replies.gets()) is not _INCOMPLETE:
                future = self._pending.popleft()
                if future.done():  # nobody waits for it any more
                    continue
                if isinstance(reply, Exception):
                    future.set_exception(reply)
                else:
                    future.set_result(reply)
        except (hiredis.ProtocolError, IndexError) as error:
            self._end(f"not a reply of Redis: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        """The socket is gone."""
        self._lost.set()
        self._end("the connection was lost" if error is None else f"the connection was lost: {error}")

    def _end(self, reason: str) -> None:
        if self.closed:
            return
        self.closed = True
        self._opened._close()  # type: ignore[no-untyped-call]  # its streams hold the transport too
        while self._pending:
            future = self._pending.popleft()
            if not future.done():
                future.set_exception(ConnectionError(reason))
                future.exception()  # of commands sent together only the last one is waited for


class RedisConnector:
    """Opens connections to one server."""

    def __init__(self, url: str, timeout_s: float) -> None:
        """Raises ValueError for a URL of another kind."""
        self._pool = redis.asyncio.ConnectionPool.from_url(
            url,
            socket_connect_timeout=timeout_s,
            # Every call runs under its own timeout. With one of redis-py's, sends go through asyncio.wait_for, which in
            # Python 3.11 can swallow a cancellation.
            socket_timeout=None,
            protocol=2,
            retry=Retry(NoBackoff(), 0),  # retries are ours, so that they end with the operation's timeout
            health_check_interval=0,
        )

    async def open(self) -> RedisConnection:
        """A new connection, authenticated and on its database. Raises OSError or RedisError."""
        opened = self._pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            await opened.connect()
            transport = opened._writer.transport
            connection = RedisConnection(opened, transport)
            transport.set_protocol(connection)
        except BaseException:
            await opened.disconnect(nowait=True)
            raise
        return connection


class RedisChannel:
    """A connection that is opened when it is needed, and again after it was lost."""

    def __init__(self, connector: RedisConnector) -> None:
        self._connector = connector
        self._connection: RedisConnection | None = None
        self._opening = asyncio.Lock()

    async def command(self, *words: Any) -> Any:
        """The reply to one command."""
        connection = self._connection
        if connection is None or connection.closed:
            connection = await self._open()
        return await connection.send(*words)

    async def transaction(self, *commands: Sequence[Any]) -> list[Any]:
        """Replies to commands that run as one."""
        connection = self._connection
        if connection is None or connection.closed:
            connection = await self._open()
        *queued, executed = connection.send_all((("MULTI",), *commands, ("EXEC",)))
        try:
            replies = await executed
        except redis.exceptions.ResponseError as error:
            # Why is in the reply to a command: that the server still loads its data, say, which passes.
            raise _first_error(queued) or error from None
        finally:
            for future in queued:
                future.cancel()
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return list(replies)

    async def script(self, script: str, keys: Sequence[str], values: Sequence[Any]) -> Any:
        """Run a script by its digest; the server is told the script itself when it does not know it."""
        try:
            return await self.command("EVALSHA", _digest(script), len(keys), *keys, *values)
        except redis.exceptions.ResponseError as error:
            if not str(error).startswith("NOSCRIPT"):
                raise
        return await self.command("EVAL", script, len(keys), *keys, *values)

    def drop(self) -> None:
        """Close the connection: what is on its way there is given up, the next command opens a new one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def close(self) -> None:
        """As `drop`, and wait until the socket is gone."""
        connection = self._connection
        self.drop()
        if connection is not None:
            await connection.wait_closed()

    async def _open(self) -> RedisConnection:
        async with self._opening:
            if self._connection is None or self._connection.closed:
                self._connection = await self._connector.open()
            return self._connection


_digests: dict[str, str] = {}


def _digest(script: str) -> str:
    digest = _digests.get(script)
    if digest is None:
        digest = _digests[script] = hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
    return digest


def _first_error(replies: Sequence[asyncio.Future[Any]]) -> BaseException | None:
    errors = [reply.exception() for reply in replies if reply.done() and not reply.cancelled()]
    return next((error for error in errors if error is not None), None)


def _reply_error(text: str) -> Exception:
    return redis.exceptions.ResponseError(text)
