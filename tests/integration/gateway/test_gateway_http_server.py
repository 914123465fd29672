"""The REST listener and its connections."""

import asyncio
import socket
import sys
from collections.abc import AsyncGenerator

import pytest
from starlette.types import Receive, Scope, Send

from services.gateway.http_server import HttpServer
from services.gateway.http_stream import EventStream
from tests.integration.gateway.conftest import eventually


@pytest.mark.skipif(sys.platform != "linux", reason="needs TCP_USER_TIMEOUT")
async def test_the_connection_of_a_client_that_stays_and_never_reads_ends() -> None:
    given_up = asyncio.Event()

    async def items() -> AsyncGenerator[int]:
        while True:
            yield 0
            await asyncio.sleep(0)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await EventStream(items(), lambda _: b"x" * 65536, write_timeout_s=0.01)(scope, receive, send)
        given_up.set()

    server = HttpServer(app, "127.0.0.1:0", grace_s=1, unread_timeout_s=0.3)
    await server.start()
    try:
        host, _, port = server.address.partition(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            async with asyncio.timeout(10):
                await given_up.wait()
            await eventually(lambda: not server._server.server_state.connections, timeout_s=10)
    finally:
        await server.stop()
