"""One child process of the cluster: its log, its end, its descendants."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]

_POLL_S = 0.02
#: Longest time the kernel may take to end a process that was killed.
_KILL_S = 5.0


class ChildProcess:
    """A service in a process group of its own. Not bound to an event loop; it dies with its parent."""

    def __init__(
        self, name: str, module: str, arguments: Sequence[str], log_path: Path, environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._command = [sys.executable, "-m", module, *arguments]
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._log_begin = 0

    def start(self) -> None:
        """Start it, or start it again after its end; its output is appended to the log."""
        if self.running:
            raise RuntimeError(f"{self.name} runs already")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._log_begin = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "deploy.local.child", str(os.getpid()), *self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self._environment),
                start_new_session=True,  # the terminal's Ctrl-C reaches the launcher alone, which stops in order
            )

    @property
    def pid(self) -> int:
        """Process id of the newest start."""
        if self._process is None:
            raise RuntimeError(f"{self.name} was never started")
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs, and before its first start."""
        return self._process.poll() if self._process is not None else None

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def descendants(self) -> list[psutil.Process]:
        """Processes it started, recursively, without itself."""
        try:
            return psutil.Process(self.pid).children(recursive=True) if self.running else []
        except psutil.NoSuchProcess:
            return []

    def tail(self, lines: int = 20) -> str:
        """Last lines it logged since its newest start."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(self._log_begin)
                text = log.read().decode("utf-8", errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def kill(self) -> None:
        """End the service alone, as a crash would, and return when it is gone."""
        if self._process is not None:
            self._process.kill()  # does nothing to a process that has ended
            self._process.wait(_KILL_S)

    async def wait(self, timeout_s: float) -> bool:
        """Whether it ended within the time."""
        return await _within(timeout_s, lambda: not self.running)

    async def stop(self, grace_s: float) -> None:
        """Ask it to stop; after `grace_s` kill it. Nothing of its process tree is left."""
        if self._process is None:
            return
        family = self.descendants()
        if self.running:
            os.kill(self.pid, signal.SIGTERM)
            await self.wait(grace_s)
        # Descendants may have left the group, and orphans in it are no descendants any more: both are ended.
        family = list({*family, *self.descendants(), *_group(self.pid)})
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()  # compares the creation time: a pid used again is another process
        await _within(grace_s, lambda: not self.running and not any(_alive(process) for process in family))


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _group(pid: int) -> list[psutil.Process]:
    """Processes of the group that `pid` leads, or led."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == pid:
                found.append(process)
    return found


async def _within(timeout_s: float, condition: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline_s:
            return False
        await asyncio.sleep(_POLL_S)
    return True
