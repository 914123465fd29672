"""The gateway: REST and gRPC for clients, one session to the scheduler, token streams from the nodes."""

import asyncio
from contextlib import suppress
from pathlib import Path

import structlog

from services.gateway.application import Application, build
from services.gateway.config import GatewaySettings
from services.gateway.http_app import create_app
from services.gateway.http_server import HttpServer
from services.gateway.routes_cluster import Readiness
from services.gateway.server import add_services
from services.gateway.tokenizer import ModelFilesError, ModelTokenizer, load_tokenizer
from services.runtime.app import StartupError, run
from services.runtime.clock import SystemClock
from services.runtime.grpc_client import open_channel
from services.runtime.grpc_server import GrpcServer

_log = structlog.get_logger()

_READINESS_PERIOD_S = 2.0


async def main(settings: GatewaySettings, stop: asyncio.Event) -> None:
    """Serve until `stop`, then drain."""
    tokenizer = _load(settings)
    model_name = _model_name(settings)
    channel = open_channel(settings.scheduler_address)
    application = build(settings, tokenizer, model_name, channel, SystemClock())
    readiness = Readiness()

    grpc_server = GrpcServer(settings.listen)
    add_services(grpc_server, application)
    http_server = HttpServer(
        create_app(application, readiness, settings.limits),
        settings.http_listen,
        grace_s=settings.shutdown_grace_s,
    )
    tasks: list[asyncio.Task[None]] = []
    try:
        await grpc_server.start()
        await http_server.start()
        _log.info("listening", address=grpc_server.address, http=http_server.address, model=model_name)
        tasks = [
            asyncio.create_task(application.run_links()),
            asyncio.create_task(_report_readiness(application, grpc_server)),
            asyncio.create_task(_wait(stop)),
        ]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # a link that failed by a fault of its own ends the service
    finally:
        readiness.draining = True
        await asyncio.gather(http_server.stop(), grpc_server.stop(settings.shutdown_grace_s))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await channel.close()


def _model_name(settings: GatewaySettings) -> str:
    return settings.model_name or Path(settings.model_path).resolve().name


def _load(settings: GatewaySettings) -> ModelTokenizer:
    try:
        return load_tokenizer(Path(settings.model_path), settings.max_context_tokens)
    except ModelFilesError as error:
        raise StartupError(str(error)) from error


async def _report_readiness(application: Application, server: GrpcServer) -> None:
    """Tell the gRPC health service what /readyz would say."""
    while True:
        await server.set_ready(not await application.cluster.not_ready_reason())
        await asyncio.sleep(_READINESS_PERIOD_S)


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        run("gateway", GatewaySettings, main)
