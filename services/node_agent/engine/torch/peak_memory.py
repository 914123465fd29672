"""The most memory that a stage takes while something runs on it."""

import ctypes
import sys
from pathlib import Path

import psutil
import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
#: Linux: "reset the peak resident set size to the process's current value".
_RESET_PEAK = "5"


class PeakMemory:
    """Peak since `reset`: allocated on the device for a GPU, resident memory of this process for a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        """Begin anew. What was freed goes back to the system, so that it is not counted."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        elif sys.platform == "linux":
            _trim()
            try:
                _CLEAR_REFS.write_text(_RESET_PEAK)
            except OSError:  # a kernel without it: the peak is the one since the process started
                return

    def peak_bytes(self) -> int:
        """The most since `reset`; 0 where the system does not tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if not _STATUS.is_file():
            return 0
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return 0


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def _trim() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)
