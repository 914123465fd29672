"""Calls to Redis that survive short outages: tried again until the operation's time is over."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import redis.exceptions
import tenacity

from services.ledger.connection import RedisChannel
from services.ledger.types import LedgerUnavailable

T = TypeVar("T")

#: Replies of a server that is up but cannot serve now: loading, failing over, out of memory or of disk.
_TRANSIENT_REPLIES: Final = (
    "LOADING",
    "MISCONF",
    "OOM",
    "READONLY",
    "MASTERDOWN",
    "CLUSTERDOWN",
    "TRYAGAIN",
    "UNBLOCKED",
)


class RedisCalls:
    """Over one channel. name: of the store, in errors."""

    def __init__(self, channel: RedisChannel, *, name: str, timeout_s: float) -> None:
        self._channel = channel
        self._name = name
        self._timeout_s = timeout_s

    async def run(self, script: str, keys: list[str], values: list[Any]) -> Any:
        """Run a script. Raises as `call`."""
        return await self.call(lambda: self._channel.script(script, keys, values))

    async def command(self, *words: Any) -> Any:
        """One command. Raises as `call`."""
        return await self.call(lambda: self._channel.command(*words))

    async def pipeline(self, *commands: tuple[Any, ...]) -> list[Any]:
        """Commands that nothing comes between. Raises as `call`."""
        return await self.call(lambda: self._channel.transaction(*commands))

    async def call(self, operation: Callable[[], Awaitable[T]], *, extra_s: float = 0.0) -> T:
        """Run with bounded retries. Raises LedgerUnavailable after the operation timeout (plus `extra_s`)."""
        first: Exception | None = None
        try:
            async with asyncio.timeout(self._timeout_s + extra_s):
                try:
                    return await operation()
                except (OSError, redis.exceptions.RedisError) as error:
                    if not _is_transient(error):
                        raise
                    first = error
                return await self._retry(operation)
        except TimeoutError as error:
            self._channel.drop()
            if first is not None:
                raise LedgerUnavailable(f"cannot reach the ledger at {self._name}: {first}") from error
            raise LedgerUnavailable(f"no answer from the ledger at {self._name} in {self._timeout_s:g} s") from error
        except (OSError, redis.exceptions.RedisError) as error:
            if not _is_transient(error):
                raise
            raise LedgerUnavailable(f"cannot reach the ledger at {self._name}: {error}") from error

    async def _retry(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Apart from the first try, which nearly always works: setting this up costs as much as a command."""
        attempts = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(_is_transient),
            wait=tenacity.wait_random_exponential(multiplier=0.02, max=0.5),
            stop=tenacity.stop_before_delay(self._timeout_s),
            reraise=True,
        )

        async def attempt() -> T:
            return await operation()

        return await attempts(attempt)


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, redis.exceptions.ResponseError):
        # NOGROUP: the server lost the stream (an emptied or new database); the next attempt makes it again.
        return str(error).startswith((*_TRANSIENT_REPLIES, "NOGROUP"))
    return isinstance(error, OSError | redis.exceptions.ConnectionError | redis.exceptions.TimeoutError)
