"""Time as a dependency, so that tests can own it."""

import time
from typing import Protocol


class Clock(Protocol):
    """Source of time. Durations use `monotonic_s`, dates `unix_s`."""

    def monotonic_s(self) -> float:
        """Seconds on a clock that never goes back."""
        ...

    def unix_s(self) -> float:
        """Seconds since the Unix epoch."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic_s(self) -> float:
        """CLOCK_MONOTONIC: on Linux the same for every process of a machine."""
        return time.monotonic()

    def unix_s(self) -> float:
        """Wall clock."""
        return time.time()


class FakeClock:
    """A clock that moves only when told to. For tests."""

    def __init__(self, monotonic_s: float = 0.0, unix_s: float = 1_700_000_000.0) -> None:
        self._monotonic_s = monotonic_s
        self._unix_s = unix_s

    def monotonic_s(self) -> float:
        """Current fake time."""
        return self._monotonic_s

    def unix_s(self) -> float:
        """Current fake date."""
        return self._unix_s

    def advance(self, seconds: float) -> None:
        """Move both clocks forward."""
        self._monotonic_s += seconds
        self._unix_s += seconds
