"""Starts the profiler."""

import asyncio
from pathlib import Path

import structlog

from lemix.internal.v1 import profiler_service_pb2 as profiler_pb2
from lemix.internal.v1 import profiler_service_pb2_grpc as profiler_grpc
from services.profiler.config import ProfilerSettings
from services.profiler.server import ProfilerServicer
from services.profiler.store import ProfileStore
from services.runtime.app import StartupError, run
from services.runtime.clock import SystemClock
from services.runtime.grpc_server import GrpcServer

_log = structlog.get_logger()


async def main(settings: ProfilerSettings, stop: asyncio.Event) -> None:
    """Serve until `stop` is set."""
    servicer = ProfilerServicer(settings, _open_store(settings.directory), SystemClock())
    server = GrpcServer(settings.listen)
    server.add(
        profiler_grpc.add_ProfilerServiceServicer_to_server,
        servicer,
        profiler_pb2.DESCRIPTOR.services_by_name["ProfilerService"].full_name,
    )
    await server.start()
    await server.set_ready(True)
    _log.info("listening", address=server.address)
    await stop.wait()
    await server.stop(settings.shutdown_grace_s)


def _open_store(directory: str) -> ProfileStore:
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(f"cannot keep profiles in {directory}: {error.strerror}") from error
    return ProfileStore(Path(directory))


if __name__ == "__main__":
    run("profiler", ProfilerSettings, main)
