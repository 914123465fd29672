"""The real gateway, REST and gRPC, in front of fakes."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.gateway.application import Application, build
from services.gateway.config import GatewaySettings
from services.gateway.http_app import create_app
from services.gateway.http_server import HttpServer
from services.gateway.routes_cluster import Readiness
from services.gateway.server import add_services
from services.gateway.tokenizer import load_tokenizer
from services.runtime.clock import SystemClock
from services.runtime.grpc_client import open_channel
from services.runtime.grpc_server import GrpcServer
from tests.integration.gateway.fakes import FakeNode, FakeScheduler
from tests.unit.gateway.model_files import write_model

MODEL = "tiny"


@dataclass
class Gateway:
    """A running gateway and what is behind it."""

    node: FakeNode
    scheduler: FakeScheduler
    application: Application
    readiness: Readiness
    http: httpx.AsyncClient
    url: str
    grpc_address: str


@pytest.fixture
def overrides() -> dict[str, Any]:
    """Settings a test module or test changes."""
    return {}


@pytest.fixture
async def gateway(tmp_path: Path, overrides: dict[str, Any]) -> AsyncIterator[Gateway]:
    node = FakeNode("node-0")
    await node.start()
    scheduler = FakeScheduler(node)
    await scheduler.start()
    model = write_model(tmp_path / MODEL)
    settings = GatewaySettings.model_validate(
        {
            "scheduler_address": scheduler.address, "model_path": str(model), "listen": "127.0.0.1:0",
            "http_listen": "127.0.0.1:0", "max_reconnect_backoff_s": 0.1, **overrides,
        }
    )  # fmt: skip
    channel = open_channel(scheduler.address)
    application = build(settings, load_tokenizer(model), MODEL, channel, SystemClock())
    readiness = Readiness()
    app = create_app(application, readiness, settings.limits)
    http_server = HttpServer(app, settings.http_listen, grace_s=1)
    grpc_server = GrpcServer(settings.listen)
    add_services(grpc_server, application)
    await http_server.start()
    await grpc_server.start()
    links = asyncio.create_task(application.run_links())
    url = f"http://{http_server.address}"
    try:
        async with asyncio.timeout(10):
            await application.link.wait_connected()
        async with httpx.AsyncClient(base_url=url, timeout=10, trust_env=False) as http:
            yield Gateway(node, scheduler, application, readiness, http, url, grpc_server.address)
    finally:
        await asyncio.gather(http_server.stop(), grpc_server.stop(0.1))
        links.cancel()
        await asyncio.gather(links, return_exceptions=True)
        await channel.close()
        await scheduler.stop()
        await node.stop()


async def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Return as soon as the condition holds; fail after the timeout."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  the condition is another component's state
            await asyncio.sleep(0.005)
