"""The timer that wakes a core when it asked to be woken."""

import asyncio
from collections.abc import Callable

from services.runtime.clock import Clock


class Wakeup:
    """At most one timer. Calls `wake` when the time that was set last has come."""

    def __init__(self, clock: Clock, wake: Callable[[], None]) -> None:
        self._clock = clock
        self._wake = wake
        self._at_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def set(self, at_s: float | None) -> None:
        """Wake at this time, monotonic clock, seconds; None: not at all."""
        if at_s == self._at_s:
            return
        self.cancel()
        self._at_s = at_s
        if at_s is not None:
            delay_s = max(0.0, at_s - self._clock.monotonic_s())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._due)

    def cancel(self) -> None:
        """Do not wake."""
        self._at_s = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self) -> None:
        self._at_s = self._timer = None
        self._wake()
