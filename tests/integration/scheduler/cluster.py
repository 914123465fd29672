"""Schedulers and peers of one test."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from services.ledger import Ledger, open_ledger
from services.runtime.clock import SystemClock
from services.scheduler.config import SchedulerSettings
from services.scheduler.service import SchedulerService, start_scheduler
from tests.integration.scheduler.fakes import WAIT_S, FakeGateway, FakeNode, write_profile


class Cluster:
    """Starts schedulers and peers, and closes what is left at the end."""

    def __init__(self, stack: AsyncExitStack, directory: Path) -> None:
        self._stack = stack
        self._directory = directory
        self.url = f"memory://{uuid.uuid4().hex}"
        self._schedulers: list[SchedulerService] = []

    async def scheduler(self, **settings: Any) -> SchedulerService:
        """A new scheduler on the same ledger."""
        values = {
            "listen": "127.0.0.1:0",
            "redis_url": self.url,
            "profile_path": write_profile(self._directory / "profile.json"),
            "node_lease_s": 2.0,
            "ledger_timeout_s": 0.5,
            "job_save_interval_s": 0.02,
            "core": {"policy": "round_robin"},
        }
        service = await start_scheduler(SchedulerSettings.model_validate({**values, **settings}), SystemClock())
        self._schedulers.append(service)
        return service

    async def stop(self, service: SchedulerService) -> None:
        """Stop one scheduler."""
        self._schedulers.remove(service)
        await service.stop(0.1)

    async def ledger(self) -> Ledger:
        """Another view of the ledger."""
        ledger = await open_ledger(self.url, operation_timeout_s=2.0)
        self._stack.push_async_callback(ledger.close)
        return ledger

    async def node(self, service: SchedulerService, node_id: str = "n0", **hello: Any) -> FakeNode:
        """A joined node."""
        node = FakeNode(service.address, await self.ledger(), node_id)
        self._stack.push_async_callback(node.close)
        return await node.join(**hello)

    async def gateway(self, service: SchedulerService, gateway_id: str = "g0") -> FakeGateway:
        """A connected gateway."""
        gateway = FakeGateway(service.address, gateway_id)
        self._stack.push_async_callback(gateway.close)
        return await gateway.connect()

    async def close(self) -> None:
        """Stop what runs."""
        for service in self._schedulers:
            await service.stop(0.1)


async def eventually(ask: Callable[[], Awaitable[bool]]) -> None:
    """Return when the answer is yes."""
    async with asyncio.timeout(WAIT_S):
        while not await ask():  # noqa: ASYNC110  asked of another process's state
            await asyncio.sleep(0.01)
