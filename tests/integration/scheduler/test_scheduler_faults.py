"""The scheduler without its ledger, and settings it cannot start with."""

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.local.redis_server import LocalRedis
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.v1 import errors_pb2
from services.runtime.app import StartupError
from services.runtime.config import ConfigError
from tests.integration.scheduler.cluster import Cluster, eventually


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalRedis]:
    """A Redis that the test may stop and start."""
    server = LocalRedis(tmp_path / "redis")
    server.start()
    yield server
    server.stop()


async def test_redis_stopped_and_started_again_loses_nothing(cluster: Cluster, server: LocalRedis) -> None:
    cluster.url = server.url
    scheduler = await cluster.scheduler()
    node, gateway = await cluster.node(scheduler, "n0", max_inflight_inference=1), await cluster.gateway(scheduler)
    for request_id in ("running", "waiting"):
        await gateway.submit(request_id)
        await gateway.news(request_id, "accepted")
    held = await node.take()
    assert await _health(scheduler.address) == health_pb2.HealthCheckResponse.SERVING

    await asyncio.to_thread(server.stop)

    async def is_unready() -> bool:
        state = (await gateway.stub.GetClusterState(pb.GetClusterStateRequest())).status
        return not state.ready and f"127.0.0.1:{server.port}" in state.not_ready_reason

    await eventually(is_unready)
    assert await _health(scheduler.address) == health_pb2.HealthCheckResponse.NOT_SERVING
    await gateway.submit("late")
    rejected = await gateway.news("late", "rejected")
    assert rejected.code == errors_pb2.ERROR_CODE_UNAVAILABLE
    assert rejected.retry_after_s > 0

    await asyncio.to_thread(server.start)

    async def is_ready() -> bool:
        return bool((await gateway.stub.GetClusterState(pb.GetClusterStateRequest())).status.ready)

    await eventually(is_ready)
    assert await node.finish(held)
    await gateway.news("running", "finished")
    await node.finish(await node.take())
    await gateway.news("waiting", "finished")
    await gateway.submit("late")
    await gateway.news("late", "assigned")

    async def serves() -> bool:
        return await _health(scheduler.address) == health_pb2.HealthCheckResponse.SERVING

    await eventually(serves)


async def _health(address: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int((await stub.Check(health_pb2.HealthCheckRequest())).status)


async def test_an_unreachable_ledger_is_named(cluster: Cluster) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cluster.url = f"redis://u:secret@127.0.0.1:{port}/0"
    with pytest.raises(StartupError, match=f"127.0.0.1:{port}") as caught:
        await cluster.scheduler(ledger_timeout_s=0.2)
    assert "secret" not in str(caught.value)


async def test_a_taken_port_leaves_the_leader_in_place(cluster: Cluster) -> None:
    first = await cluster.scheduler()
    token = await (await cluster.ledger()).newest_token()
    with pytest.raises(StartupError, match="in use"):
        await cluster.scheduler(listen=first.address)
    assert await (await cluster.ledger()).newest_token() == token


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"profile_path": ""}, "profiler_address"),
        ({"reprofile_idle_s": 5.0}, "reprofile_idle_s"),
        ({"profile_path": "/nowhere/p.json"}, "/nowhere/p.json"),
        ({"core": {"policy": "fastest"}}, "fastest"),
        ({"core": {"policy": "round_robin", "max_waiting_training": 0}}, "max_waiting_training"),
        ({"redis_url": "http://x"}, "redis_url"),
        ({"event_log_path": "/proc/none/log"}, "event_log_path"),
    ],
)
async def test_a_setting_that_cannot_work_is_named(cluster: Cluster, settings: dict[str, object], named: str) -> None:
    with pytest.raises((ConfigError, StartupError), match=named):
        await cluster.scheduler(**settings)
