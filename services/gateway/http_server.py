"""The REST listener: uvicorn inside the service's own loop, with the service's own signals."""

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from services.runtime.app import StartupError

_BACKLOG = 512
#: How often uvicorn sets the date that answers carry.
_TICK_S = 1.0
#: How long a client may leave what was sent to it untaken; then the kernel ends the connection. As long as one write of
#: an event stream may be held up: uvicorn waits for its buffer to drain even when the answer was given up, so that a
#: client that stays and never reads would keep the socket and the buffer for ever.
_UNREAD_TIMEOUT_S = 60.0


class HttpServer:
    """One listening server. `start`, later `stop`."""

    def __init__(
        self, app: ASGIApp, listen: str, *, grace_s: float, unread_timeout_s: float = _UNREAD_TIMEOUT_S
    ) -> None:
        """listen: host:port. grace_s: time running requests get at the stop. unread_timeout_s: time a client may take
        nothing of what was sent; Linux only."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # failures are logged by the app itself
        self._listen = listen
        self._unread_timeout_s = unread_timeout_s
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=max(1, round(grace_s)),
        )
        self._server = _Server(config)
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen. Raises StartupError naming the address when it cannot be used."""
        host, _, port = self._listen.rpartition(":")
        host = host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, int(port)), family=family, backlog=_BACKLOG)
        except (OSError, ValueError, OverflowError) as error:
            raise StartupError(f"cannot listen on {self._listen}: {error}") from error
        if sys.platform == "linux":  # accepted sockets inherit it
            timeout_ms = round(self._unread_timeout_s * 1000)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    @property
    def address(self) -> str:
        """host:port that clients dial, with the real port."""
        assert self._socket is not None
        return f"{self._listen.rpartition(':')[0]}:{self._socket.getsockname()[1]}"

    async def stop(self) -> None:
        """Refuse new connections, let running requests finish for the grace time, close."""
        if self._task is not None:
            self._server.exit()
            await self._task


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopping = asyncio.Event()

    def exit(self) -> None:
        """End `serve`."""
        self.should_exit = True
        self._stopping.set()

    async def main_loop(self) -> None:
        """Until the exit; uvicorn's own loop looks for it ten times a second."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):
                    await self._stopping.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the service."""
        yield
