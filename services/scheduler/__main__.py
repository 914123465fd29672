"""Starts the scheduler."""

import asyncio

import structlog

from services.runtime.app import run
from services.runtime.clock import SystemClock
from services.scheduler.config import SchedulerSettings
from services.scheduler.service import start_scheduler

_log = structlog.get_logger()


async def main(settings: SchedulerSettings, stop: asyncio.Event) -> None:
    """Serve until `stop` is set."""
    service = await start_scheduler(settings, SystemClock())
    _log.info("listening", address=service.address)
    try:
        await service.run_until(stop)
    finally:
        await service.stop(settings.shutdown_grace_s)


if __name__ == "__main__":
    run("scheduler", SchedulerSettings, main)
