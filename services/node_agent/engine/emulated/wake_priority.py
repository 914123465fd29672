"""Lets the kernel wake the calling thread at once.

The end of an emulated operation stands for a device's, which shares no core with the control plane: it must not wait
until another process of the cluster has used its time slice up.
"""

import ctypes
import os
import sys
from enum import StrEnum

_SYS_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_SCHED_OTHER = 0
_RESET_ON_FORK = 1
_LOWEST_REAL_TIME = 1
_SLICE_NS = 200_000


class WakePriority(StrEnum):
    """What the kernel granted. REAL_TIME: before every ordinary process. SHORT_SLICE: before ordinary processes that
    have had their share (Linux 6.12 and later heed it). USUAL: like any other."""

    REAL_TIME = "real_time"
    SHORT_SLICE = "short_slice"
    USUAL = "usual"


def wake_first() -> WakePriority:
    """Ask for the best the kernel grants the calling thread; processes and threads that it starts do not inherit it."""
    if sys.platform != "linux":
        return WakePriority.USUAL
    try:
        # Real-time processes leave a twentieth of every second to the others, however busy they are.
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(_LOWEST_REAL_TIME))
        return WakePriority.REAL_TIME
    except OSError:
        return WakePriority.SHORT_SLICE if _ask_for_slice() else WakePriority.USUAL


class _SchedAttr(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime_ns", ctypes.c_uint64),
        ("deadline_ns", ctypes.c_uint64),
        ("period_ns", ctypes.c_uint64),
    )


def _ask_for_slice() -> bool:
    number = _SYS_SCHED_SETATTR.get(os.uname().machine)
    if number is None:
        return False
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    wanted = _SchedAttr(
        size=ctypes.sizeof(_SchedAttr), policy=_SCHED_OTHER, flags=_RESET_ON_FORK, nice=nice, runtime_ns=_SLICE_NS
    )
    result: int = ctypes.CDLL(None, use_errno=True).syscall(number, 0, ctypes.byref(wanted), 0)
    return result == 0
