"""Calls back at a time, to some tens of microseconds: the timers of the event loop know milliseconds only.

On Linux a timer file descriptor wakes the loop; elsewhere the loop's own timers do. A processor that sleeps needs some
tenths of a millisecond to wake up: the descriptor is set so much earlier as the quickest of the last wake-ups was late,
and what is left is waited for awake.
"""

import asyncio
import contextlib
import ctypes
import heapq
import itertools
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

_CLOCK_MONOTONIC = 1
_TFD_NONBLOCK = os.O_NONBLOCK
_TFD_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_TFD_TIMER_ABSTIME = 1
_NS = 1_000_000_000
#: Wake-ups among which the quickest counts, and the most that is waited for awake, seconds.
_WAKE_UPS = 32
_LONGEST_LEAD_S = 0.0005


class Timer(Protocol):
    """Where the end of an emulated op comes from."""

    def call_at(self, time_s: float, call: Callable[[], None]) -> None:
        """Call once, at or after this time of the monotonic clock, from the event loop."""
        ...

    def close(self) -> None:
        """Nothing is called any more."""
        ...


class LoopTimer:
    """The event loop's timers."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pending: set[asyncio.TimerHandle] = set()

    def call_at(self, time_s: float, call: Callable[[], None]) -> None:
        """See Timer."""
        handle: asyncio.TimerHandle

        def due() -> None:
            self._pending.discard(handle)
            call()

        handle = self._loop.call_at(time_s, due)
        self._pending.add(handle)

    def close(self) -> None:
        """See Timer."""
        for handle in self._pending:
            handle.cancel()
        self._pending.clear()


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("it_interval", _Timespec), ("it_value", _Timespec))


class PreciseTimer:
    """One timer of the kernel for all calls: it is always set to the earliest. Raises OSError when there is none."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC)
        if self._descriptor < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        self._loop = asyncio.get_running_loop()
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        #: What the kernel's timer is set to, seconds; None: it is not set.
        self._set_s: float | None = None
        self._value = _Itimerspec()
        self._late_s: deque[float] = deque((0.0,), maxlen=_WAKE_UPS)
        self._lead_s = 0.0
        self._loop.add_reader(self._descriptor, self._due)

    def call_at(self, time_s: float, call: Callable[[], None]) -> None:
        """See Timer."""
        heapq.heappush(self._calls, (time_s, next(self._order), call))
        self._set()

    def close(self) -> None:
        """See Timer."""
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
            self._calls.clear()

    def _due(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._descriptor, 8)
        now_s = time.monotonic()
        if self._set_s is not None:
            self._learn(now_s - (self._set_s - self._lead_s))
        self._set_s = None
        if self._calls and now_s < self._calls[0][0] <= now_s + _LONGEST_LEAD_S:
            while now_s < self._calls[0][0]:
                now_s = time.monotonic()
        while self._calls and self._calls[0][0] <= now_s and self._descriptor >= 0:
            heapq.heappop(self._calls)[2]()
        if self._descriptor >= 0:
            self._set()

    def _learn(self, late_s: float) -> None:
        """The kernel woke the loop so much later than it was told to."""
        self._late_s.append(late_s)
        self._lead_s = min(_LONGEST_LEAD_S, max(0.0, min(self._late_s)))

    def _set(self) -> None:
        if not self._calls or self._set_s == self._calls[0][0]:
            return
        self._set_s = self._calls[0][0]
        # A time of zero would stop the timer; one that is past fires at once.
        ns = max(1, int((self._set_s - self._lead_s) * _NS))
        self._value.it_value.tv_sec, self._value.it_value.tv_nsec = divmod(ns, _NS)
        if self._libc.timerfd_settime(self._descriptor, _TFD_TIMER_ABSTIME, ctypes.byref(self._value), None) < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))


def device_timer() -> Timer:
    """The best timer of this machine. Call it with a running event loop."""
    return PreciseTimer() if sys.platform == "linux" else LoopTimer()
