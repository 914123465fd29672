"""What a benchmark ran on and with: the facts every summary carries."""

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
_TIMEOUT_S = 10.0


def machine() -> dict[str, Any]:
    """`cpu` (model name), `cores` (usable by this process), `gpu` (names, empty without one), `python`, `system`."""
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "gpu": gpu_names(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def usable_cores() -> int:
    """How many cores this process may run on: a container's share, not the whole host."""
    return len(usable_core_ids())


def usable_core_ids() -> list[int]:
    """The cores this process may run on, in order."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Model name of the processor, as the kernel tells it."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs the driver shows; empty without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    output = _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
    return [line.strip() for line in (output or "").splitlines() if line.strip()]


def git_commit(root: Path = _ROOT) -> str:
    """Commit of the repository, with `-dirty` when tracked files differ from it; `unknown` outside a checkout."""
    commit = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    if commit is None:
        return "unknown"
    changes = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return commit.strip() + ("-dirty" if changes else "")


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
