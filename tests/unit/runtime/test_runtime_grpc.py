"""The gRPC server: errors on the wire, ports, health. Over real loopback connections."""

import asyncio

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from lemix.errors import METADATA_KEY, ErrorCode, LemixError
from services.runtime import healthcheck
from services.runtime.app import StartupError
from services.runtime.grpc_client import open_channel, wait_connected
from services.runtime.grpc_server import GrpcServer

SERVICE = "test.Errors"


class Handlers:
    """One method per shape of call; each raises `failure` if it is set. Messages are raw bytes."""

    def __init__(self):
        self.failure = None
        self.before_failure = 0

    async def unary(self, request, context):
        if self.failure is not None:
            raise self.failure
        return request

    async def stream(self, request, context):
        for _ in range(self.before_failure):
            yield request
        if self.failure is not None:
            raise self.failure

    async def collect(self, requests, context):
        return b"".join([request async for request in requests]) + await self.unary(b"", context)

    async def echo(self, requests, context):
        async for request in requests:
            yield await self.unary(request, context)


def register(handlers, server):
    methods = {
        "Unary": grpc.unary_unary_rpc_method_handler(handlers.unary),
        "Stream": grpc.unary_stream_rpc_method_handler(handlers.stream),
        "Collect": grpc.stream_unary_rpc_method_handler(handlers.collect),
        "Echo": grpc.stream_stream_rpc_method_handler(handlers.echo),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))


@pytest.fixture
def handlers():
    return Handlers()


@pytest.fixture
async def server(handlers):
    server = GrpcServer("127.0.0.1:0")
    server.add(register, handlers, SERVICE)
    await server.start()
    yield server
    await server.stop(0)


@pytest.fixture
async def channel(server):
    async with open_channel(server.address) as channel:
        yield channel


async def test_health_can_be_watched(server, channel):
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    async with asyncio.timeout(5):
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        await server.set_ready(True)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


async def consume(call):
    return [message async for message in call]


CALLS = {
    "unary": lambda channel: channel.unary_unary(f"/{SERVICE}/Unary")(b"x", timeout=5),
    "unary stream": lambda channel: consume(channel.unary_stream(f"/{SERVICE}/Stream")(b"x", timeout=5)),
    "stream unary": lambda channel: channel.stream_unary(f"/{SERVICE}/Collect")(iter([b"x"]), timeout=5),
    "stream stream": lambda channel: consume(channel.stream_stream(f"/{SERVICE}/Echo")(iter([b"x"]), timeout=5)),
}


async def failure_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
async def test_a_lemix_error_arrives_as_it_was_raised(channel, handlers, call):
    handlers.failure = LemixError(ErrorCode.OVERLOADED, "full", param="queue", retry_after_s=1.5)
    error = await failure_of(call(channel))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details() == "full"
    back = LemixError.from_rpc(error)
    assert (back.code, back.message, back.param, back.retry_after_s) == (ErrorCode.OVERLOADED, "full", "queue", 1.5)


@pytest.mark.parametrize("code", list(ErrorCode))
async def test_every_code_survives_the_wire(channel, handlers, code):
    handlers.failure = LemixError(code, "why")
    assert LemixError.from_rpc(await failure_of(CALLS["unary"](channel))).code is code


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
async def test_a_fault_of_ours_tells_the_caller_nothing_and_the_log_everything(channel, handlers, call):
    handlers.failure = ValueError("secret path /etc/x")
    with capture_logs() as logs:
        error = await failure_of(call(channel))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(error.details())
    assert LemixError.from_rpc(error).code is ErrorCode.INTERNAL
    assert [entry["exc_info"] for entry in logs] == [handlers.failure]


async def test_messages_before_the_error_arrive(channel, handlers):
    handlers.before_failure, handlers.failure = 3, LemixError(ErrorCode.NODE_LOST, "gone")
    call = channel.unary_stream(f"/{SERVICE}/Stream")(b"x", timeout=5)
    assert [await call.read() for _ in range(3)] == [b"x"] * 3
    assert LemixError.from_rpc(await failure_of(call.read())).code is ErrorCode.NODE_LOST


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
async def test_without_an_error_nothing_is_added(channel, handlers, call):
    handlers.before_failure = 1
    assert await call(channel) in (b"x", [b"x"])


async def test_an_unknown_method_is_unsupported(channel):
    error = await failure_of(channel.unary_unary(f"/{SERVICE}/Nope")(b"", timeout=5))
    assert METADATA_KEY not in dict(error.trailing_metadata() or ())
    assert LemixError.from_rpc(error).code is ErrorCode.UNSUPPORTED


async def test_a_port_in_use_is_a_start_up_error_that_names_it(server):
    second = GrpcServer(server.address)
    with pytest.raises(StartupError, match=f"cannot listen on {server.address}"):
        await second.start()
    await second.stop(0)


async def test_nobody_listening_is_a_start_up_error_that_names_what(server):
    await server.stop(0)
    async with open_channel(server.address) as channel:
        with pytest.raises(StartupError, match=f"cannot reach the scheduler at {server.address} within 0.2 s"):
            await wait_connected(channel, server.address, 0.2, "the scheduler")


async def test_health_follows_readiness(server, channel):
    stub = health_pb2_grpc.HealthStub(channel)

    async def status(name):
        return (await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)).status

    await server.set_ready(True)
    assert await status(SERVICE) == await status("") == health_pb2.HealthCheckResponse.SERVING
    assert await asyncio.to_thread(healthcheck.check, server.address) == ""
    await server.set_ready(False)
    assert await status(SERVICE) == health_pb2.HealthCheckResponse.NOT_SERVING
    assert await asyncio.to_thread(healthcheck.check, server.address) == "NOT_SERVING"


async def test_a_health_check_of_nobody_fails_in_time(server, capsys):
    await server.stop(0)
    assert await asyncio.to_thread(healthcheck.check, server.address, 0.2) == "DEADLINE_EXCEEDED"
    assert healthcheck.main([]) == 2
    assert "usage" in capsys.readouterr().err


async def test_a_stopping_server_lets_a_running_call_finish(server, channel, handlers):
    entered, release = asyncio.Event(), asyncio.Event()

    async def slow(request, context):
        entered.set()
        await release.wait()
        return request

    handlers.unary, original = slow, handlers.unary
    call = channel.stream_unary(f"/{SERVICE}/Collect")(iter([b"x"]), timeout=5)
    await asyncio.wait_for(entered.wait(), 5)
    stopping = asyncio.create_task(server.stop(5.0))
    release.set()
    assert await call == b"x"
    await stopping
    handlers.unary = original
