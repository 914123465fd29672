"""Starts a node agent: `python -m services.node_agent`."""

import asyncio
import gc
from typing import Any

import structlog

from services.ledger import LedgerUnavailable, open_ledger
from services.node_agent.agent import NodeAgent
from services.node_agent.config import NodeAgentSettings
from services.node_agent.engine.emulated.wake_priority import wake_first
from services.node_agent.engine_choice import load
from services.node_agent.loop_ports import NodeBroken
from services.runtime.app import StartupError, run
from services.runtime.clock import SystemClock
from services.runtime.grpc_client import open_channel

_log = structlog.get_logger()


async def main(settings: NodeAgentSettings, stop: asyncio.Event) -> None:
    """Run a node until `stop`. Raises StartupError when it cannot start or cannot go on."""
    engine, fingerprint = await load(settings)
    if settings.engine == "emulated":
        _log.info("emulated device", wake_priority=str(wake_first()))
    try:
        try:
            ledger = await open_ledger(settings.redis_url)
        except (LedgerUnavailable, ValueError) as error:
            raise StartupError(str(error)) from error
        async with open_channel(settings.scheduler_address) as scheduler:
            agent = NodeAgent(
                settings=settings,
                engine=engine,
                ledger=ledger,
                scheduler=scheduler,
                fingerprint=fingerprint,
                clock=SystemClock(),
            )
            try:
                await agent.start()
                # What is there by now stays. Looking through it again and again would hold ops up, for 40 ms at a time.
                gc.collect()
                gc.freeze()
                await _until(stop, agent)
                await agent.drain()
            finally:
                await agent.stop()
                await ledger.close()
    finally:
        await engine.close()


async def _until(stop: asyncio.Event, agent: NodeAgent) -> None:
    """Until `stop`; a node that cannot go on ends at once, so that the scheduler gives its work to others."""
    waiting = asyncio.ensure_future(stop.wait())
    ends: list[asyncio.Future[Any]] = [waiting, agent.broken]
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if agent.broken.done():
            agent.broken.result()
    except NodeBroken as error:
        raise StartupError(f"the node cannot go on: {error}") from error
    finally:
        waiting.cancel()


if __name__ == "__main__":
    run("node_agent", NodeAgentSettings, main)
