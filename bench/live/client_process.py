"""The benchmark's end of the client process."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.live.errors import LiveError
from bench.live.plan_file import read_records
from bench.live.requests import RequestRecord
from deploy.local.process import ROOT

_READY_S = 30.0
_STOP_S = 5.0

Counts = Mapping[str, int]


class ClientProcess:
    """Starts `bench.live.client` on a plan; it dies with the benchmark."""

    def __init__(self, plan: Path) -> None:
        self._plan = plan
        self._records = plan.with_suffix(".records.jsonl")
        self._log = plan.with_suffix(".client.log")
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """Process id."""
        return self._running().pid

    async def start(self) -> None:
        """Return when the client has connected and waits for the start. Raises LiveError with its log."""
        self._records.unlink(missing_ok=True)
        wrapper = [sys.executable, "-m", "deploy.local.child", str(os.getpid())]
        command = [sys.executable, "-m", "bench.live.client", str(self._plan), str(self._records)]
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *wrapper,
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "sdk")))},
                start_new_session=True,
            )
        try:
            line = await asyncio.wait_for(self._read_line(), _READY_S)
        except TimeoutError:
            raise LiveError(f"the client was not ready within {_READY_S:g} s; see {self._log}") from None
        if line.strip() != b"ready":
            raise LiveError(f"the client could not start: {self._tail()}")

    async def run(self, start_s: float, on_progress: Callable[[Counts], None]) -> list[RequestRecord]:
        """Let it send; returns when it has ended. Raises LiveError with its log when it failed."""
        process = self._running()
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it has ended: its exit code tells below
            process.stdin.write(f"{start_s!r}\n".encode())
            await process.stdin.drain()
        while line := await self._read_line():
            on_progress(json.loads(line))
        if await process.wait() != 0:
            raise LiveError(f"the client ended with exit code {process.returncode}: {self._tail()}")
        return read_records(self._records)

    async def stop(self) -> None:
        """End it if it still runs."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await asyncio.wait_for(self._process.wait(), _STOP_S)

    async def _read_line(self) -> bytes:
        process = self._running()
        assert process.stdout is not None
        return await process.stdout.readline()

    def _tail(self) -> str:
        return " | ".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])

    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise RuntimeError("the client was not started")
        return self._process
