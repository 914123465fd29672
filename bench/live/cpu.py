"""CPU time by role: who used the machine while a policy ran."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import psutil

from bench.machine import usable_core_ids

#: Role of everything outside the demo, interrupts and a hypervisor's other guests included.
OTHERS = "other_programs"


def role_of(process: str) -> str:
    """Role of a process of the local cluster by its name there; a node agent's children are its stage workers."""
    if process.startswith("node-"):
        return "stage_workers" if "/" in process else "node_agents"
    return process.split("/")[0]


class CpuMeter:
    """CPU seconds of processes from their first sample to their last; sample often, for processes may end."""

    def __init__(self) -> None:
        self._roles: dict[int, str] = {}
        self._processes: dict[int, psutil.Process] = {}
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._machine_first_s: float | None = None
        self._machine_last_s = 0.0

    def sample(self, processes: Mapping[str, int]) -> None:
        """Read the clocks of these processes (name to pid). A process that has ended keeps its last reading."""
        self._machine_last_s = _busy_s()
        if self._machine_first_s is None:
            self._machine_first_s = self._machine_last_s
        for name, pid in processes.items():
            try:
                if pid not in self._processes:  # made once: that reads more than the times
                    self._processes[pid] = psutil.Process(pid)
                times = self._processes[pid].cpu_times()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            used_s = times.user + times.system
            self._roles[pid] = role_of(name)
            self._first.setdefault(pid, used_s)
            self._last[pid] = used_s

    def totals_s(self) -> dict[str, float]:
        """CPU seconds by role; `OTHERS` is what the machine was busy with besides the sampled processes."""
        totals: defaultdict[str, float] = defaultdict(float)
        for pid, role in self._roles.items():
            totals[role] += self._last[pid] - self._first[pid]
        if self._machine_first_s is not None:
            totals[OTHERS] = max(0.0, self._machine_last_s - self._machine_first_s - sum(totals.values()))
        return dict(totals)


def _busy_s() -> float:
    """Seconds the usable cores were not idle, since the machine started."""
    cores = psutil.cpu_times(percpu=True)
    ids = [core for core in usable_core_ids() if core < len(cores)]
    return sum(
        sum(cores[core]) - cores[core].idle - getattr(cores[core], "iowait", 0.0) - _guests_s(cores[core])
        for core in ids
    )


def _guests_s(times: Any) -> float:
    """Time of virtual machines, which `user` and `nice` hold already."""
    return float(getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0))
