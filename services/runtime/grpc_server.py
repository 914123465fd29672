"""A gRPC server with health, reflection and a draining stop."""

from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.runtime.app import StartupError
from services.runtime.interceptors import ErrorInterceptor

#: Largest message either way, bytes. Long prompts and batches of examples fit; weights travel in 1 MiB chunks.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024

OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]


class GrpcServer:
    """One listening server. Add services, `start`, then `set_ready` when dependencies are there."""

    def __init__(self, listen: str) -> None:
        self._listen = listen
        self._server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=OPTIONS)
        self._health = health.aio.HealthServicer()
        self._names: list[str] = []
        self.port = 0

    def add(self, register: Callable[[Any, grpc.aio.Server], None], servicer: Any, full_name: str) -> None:
        """Add a service: its generated `add_..._to_server`, the implementation and its full proto name."""
        register(servicer, self._server)
        self._names.append(full_name)

    async def start(self) -> None:
        """Listen. Raises StartupError naming the address when the port is taken."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        try:
            self.port = self._server.add_insecure_port(self._listen)
        except RuntimeError as error:
            raise StartupError(f"cannot listen on {self._listen}: is the port in use?") from error
        await self._server.start()

    @property
    def address(self) -> str:
        """host:port that clients dial, with the real port."""
        return f"{self._listen.rsplit(':', 1)[0]}:{self.port}"

    async def set_ready(self, ready: bool) -> None:
        """Tell the health service."""
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._names):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, let running ones finish for `grace_s`, then cut them off."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
