"""The outermost frame of a service: settings, logs, signals, exit codes."""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog
import uvloop

from services.runtime.config import ConfigError, ServiceSettings, load_settings
from services.runtime.observability import configure_logging, serve_metrics

S = TypeVar("S", bound=ServiceSettings)

_log = structlog.get_logger()


class StartupError(RuntimeError):
    """The service cannot start for a reason its operator can mend; the message says how. Exit code 1."""


def run(service: str, cls: type[S], main: Callable[[S, asyncio.Event], Awaitable[None]]) -> None:
    """Run a service until SIGINT or SIGTERM, then exit.

    `main(settings, stop)` returns after `stop` is set and everything is closed; it raises ConfigError for a setting
    that only it can judge. Exit codes: 0 stopped, 1 could not start or failed, 2 bad settings. A bad setting or an
    unreachable dependency is one line on stderr, no traceback.
    """
    try:
        settings = load_settings(cls, service, sys.argv[1:], os.environ)
        configure_logging(service, settings.log)
        serve_metrics(settings.metrics_port)
        uvloop.run(_with_signals(settings, main))
    except (ConfigError, StartupError) as error:
        print(f"{service}: {error}", file=sys.stderr)  # noqa: T201  one plain line for the operator
        sys.exit(2 if isinstance(error, ConfigError) else 1)


async def _with_signals(settings: S, main: Callable[[S, asyncio.Event], Awaitable[None]]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await main(settings, stop)
    _log.info("stopped")
