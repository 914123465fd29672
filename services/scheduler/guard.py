"""The ledger as the scheduler uses it: known to be there or away, with the two ways to live with its absence."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from lemix.errors import LemixError
from services.ledger import Ledger, LedgerUnavailable
from services.scheduler import metrics
from services.scheduler.refusals import unavailable

_log = structlog.get_logger()

T = TypeVar("T")

_RETRY_FIRST_S = 0.05
_RETRY_MAX_S = 2.0


class LedgerGuard:
    """Counts failures and logs once per change. `on_change(available)` is called at each change."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        #: Why the ledger is away; empty while it answers.
        self.outage = ""
        self.on_change: Callable[[bool], None] = lambda available: None

    @property
    def available(self) -> bool:
        """Whether the last operation was answered."""
        return not self.outage

    async def until_done(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Repeat until it works, however long: for work that is accepted already. The operation is idempotent."""
        delay_s = _RETRY_FIRST_S
        while True:
            try:
                result = await operation()
            except LedgerUnavailable as error:
                self._failed(error)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, _RETRY_MAX_S)
            else:
                self._worked()
                return result

    async def once(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Try for a caller who can come again. Raises LemixError(UNAVAILABLE) at once while the ledger is away."""
        if not self.available:
            raise self._unavailable()
        try:
            result = await operation()
        except LedgerUnavailable as error:
            self._failed(error)
            raise self._unavailable() from error
        self._worked()
        return result

    def _unavailable(self) -> LemixError:
        return unavailable("the ledger of accepted work does not answer")

    def _failed(self, error: LedgerUnavailable) -> None:
        metrics.LEDGER_ERRORS.inc()
        if self.available:
            _log.error("ledger lost, will retry", error=str(error))
            self.outage = str(error)
            self.on_change(False)

    def _worked(self) -> None:
        if not self.available:
            _log.info("ledger back")
            self.outage = ""
            self.on_change(True)
