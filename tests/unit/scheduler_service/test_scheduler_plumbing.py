"""Queues, the event log, the guard of the ledger and the profile sources."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import profile_pb2, profiler_service_pb2, profiler_service_pb2_grpc
from lemix.internal.v1 import scheduler_service_pb2 as pb
from services.latency import OpKind
from services.ledger import LedgerUnavailable, open_ledger
from services.profile_artifact import write_artifact
from services.runtime.app import StartupError
from services.runtime.grpc_server import GrpcServer
from services.scheduler.core.codec import command_from_json, config_from_json, event_from_json
from services.scheduler.core.commands import Assign
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import OpFinished, TaskArrived, Tick
from services.scheduler.core.tasks import InferenceTask
from services.scheduler.event_log import EventLog
from services.scheduler.guard import LedgerGuard
from services.scheduler.inbox import Inbox, Told, Traced
from services.scheduler.outbox import Outbox
from services.scheduler.profiles import ProfilerClient, StoredProfile

OP = OpFinished("n", 0, OpKind.DECODE, 0.0, 1.0)


async def test_traces_give_way_long_before_the_inbox_is_full() -> None:
    inbox = Inbox(4)
    for _ in range(10):
        inbox.put_trace(Traced((OP,)))
    await inbox.put(Told(Tick()))
    await inbox.put(Told(Tick()))
    received = [await inbox.get(0.0) for _ in range(5)]
    assert received == [Traced((OP,)), Traced((OP,)), Told(Tick()), Told(Tick()), None]


async def test_a_full_inbox_makes_senders_wait() -> None:
    inbox = Inbox(1)
    await inbox.put(Told(Tick()))
    second = asyncio.create_task(inbox.put(Told(Tick())))
    await asyncio.sleep(0)
    assert not second.done()
    assert await inbox.get(None) == Told(Tick())
    await second


async def test_a_slow_reader_is_cut_off_after_what_was_queued() -> None:
    outbox: Outbox[int] = Outbox(2)
    assert outbox.send(1)
    assert outbox.send(2)
    assert not outbox.send(3)
    assert not outbox.send(4)
    outbox.close("again")
    assert [message async for message in outbox.messages()] == [1, 2]
    assert outbox.closed_reason == "it does not read its messages"


def test_the_event_log_can_be_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "events.jsonl"
    config = CoreConfig(policy="round_robin")
    log = EventLog(path, config)
    event = TaskArrived(InferenceTask("r", 0.1, 3, 4))
    log.add(1.25, event, [Assign("r", "n0")])
    log.add(2.5, Tick(), [])
    log.close()
    log.close()
    first, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert config_from_json(first["config"]) == config
    assert [line["now_s"] for line in lines] == [1.25, 2.5]
    assert event_from_json(lines[0]["event"]) == event
    assert [command_from_json(command) for command in lines[0]["commands"]] == [Assign("r", "n0")]


def test_what_the_event_log_has_no_room_for_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.scheduler.event_log._MAX_BUFFERED", 3)
    monkeypatch.setattr("services.scheduler.event_log._WRITE_INTERVAL_S", 60.0)
    log = EventLog(tmp_path / "events.jsonl", CoreConfig())
    for number in range(10):
        log.add(float(number), Tick(), [])
    log.close()
    _, *lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line.get("now_s") for line in lines] == [0.0, 1.0, 2.0, None]
    assert lines[-1] == {"dropped": 7}


@pytest.mark.parametrize("count", [1, 5000])
def test_a_full_disk_stops_the_log_and_nothing_else(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    log = EventLog(Path("/dev/full"), CoreConfig())
    for number in range(count):
        log.add(float(number), Tick(), [])
    log.close()
    assert capsys.readouterr().out.count("event log stopped") == 1


class Flaky:
    """An operation that fails so many times before it works."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    async def __call__(self) -> str:
        if self.failures:
            self.failures -= 1
            raise LedgerUnavailable("redis://h:1/0 is away")
        return "done"


@pytest.fixture
async def guard() -> LedgerGuard:
    return LedgerGuard(await open_ledger(f"memory://{uuid.uuid4().hex}"))


async def test_accepted_work_is_retried_until_the_ledger_is_back(guard: LedgerGuard) -> None:
    changes: list[bool] = []
    guard.on_change = changes.append
    assert await guard.until_done(Flaky(2)) == "done"
    assert changes == [False, True]
    assert guard.available


async def test_callers_are_sent_away_at_once_while_the_ledger_is_away(guard: LedgerGuard) -> None:
    with pytest.raises(LemixError) as caught:
        await guard.once(Flaky(1))
    assert (caught.value.code, caught.value.retry_after_s) == (ErrorCode.UNAVAILABLE, 1.0)
    assert "h:1" not in caught.value.message
    untried = Flaky(0)
    with pytest.raises(LemixError):
        await guard.once(untried)
    assert guard.outage == "redis://h:1/0 is away"
    await guard.until_done(Flaky(0))
    assert await guard.once(untried) == "done"


def profile() -> profile_pb2.Profile:
    fit = profile_pb2.LatencyFit(op=profile_pb2.OP_KIND_PREFILL, model="constant", coefficients=[0.25], chosen=True)
    return profile_pb2.Profile(profile_id="f-1", fingerprint="f", num_stages=1, fits=[fit])


async def test_a_stored_profile_serves_every_node(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(write_artifact(profile()), encoding="utf-8")
    latency = await StoredProfile(path).latency(pb.NodeHello())
    assert latency.op_s(0, OpKind.PREFILL, 1, 1) == 0.25
    path.write_text("{", encoding="utf-8")
    with pytest.raises(StartupError, match=r"p\.json"):
        StoredProfile(path)


class FakeProfiler(profiler_service_pb2_grpc.ProfilerServiceServicer):
    """Knows what it has measured."""

    def __init__(self) -> None:
        self.stored: dict[str, profile_pb2.Profile] = {}
        self.measured: list[str] = []
        #: Measurements that must run at the same time before any ends.
        self.together = asyncio.Barrier(1)

    async def GetProfile(self, request: Any, context: Any) -> Any:  # noqa: N802
        if request.fingerprint not in self.stored:
            raise LemixError(ErrorCode.NOT_FOUND, "unknown")
        return profiler_service_pb2.GetProfileResponse(profile=self.stored[request.fingerprint])

    async def ProfileNode(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.measured.append(request.node_address)
        if request.node_address == "busy:1":
            raise LemixError(ErrorCode.CONFLICT, "the node has work")
        yield profiler_service_pb2.ProfileNodeResponse(progress=profiler_service_pb2.ProfileProgress(points_total=1))
        await self.together.wait()
        self.stored["f"] = profile()
        yield profiler_service_pb2.ProfileNodeResponse(profile=self.stored["f"])


@pytest.fixture
async def profiler() -> AsyncIterator[tuple[FakeProfiler, ProfilerClient]]:
    server, fake = GrpcServer("127.0.0.1:0"), FakeProfiler()
    server.add(profiler_service_pb2_grpc.add_ProfilerServiceServicer_to_server, fake, "p")
    await server.start()
    client = ProfilerClient(grpc.aio.insecure_channel(server.address), measure_timeout_s=5.0)
    yield fake, client
    await client.close()
    await server.stop(0.0)


async def test_nodes_that_join_together_are_measured_at_once(profiler: tuple[FakeProfiler, ProfilerClient]) -> None:
    fake, client = profiler
    fake.together = asyncio.Barrier(3)
    hellos = [pb.NodeHello(node_id=name, address=f"{name}:1", profile_fingerprint="f") for name in "abc"]
    latencies = await asyncio.gather(*(client.latency(hello) for hello in hellos))
    assert sorted(fake.measured) == ["a:1", "b:1", "c:1"]
    assert [latency.num_stages for latency in latencies] == [1, 1, 1]


async def test_a_node_of_a_known_kind_is_not_measured(profiler: tuple[FakeProfiler, ProfilerClient]) -> None:
    fake, client = profiler
    for name in "ab":
        latency = await client.latency(pb.NodeHello(node_id=name, address=f"{name}:1", profile_fingerprint="f"))
        assert latency.num_stages == 1
    assert fake.measured == ["a:1"]


async def test_a_failed_measurement_keeps_its_reason(profiler: tuple[FakeProfiler, ProfilerClient]) -> None:
    _, client = profiler
    with pytest.raises(LemixError, match="has work") as caught:
        await client.latency(pb.NodeHello(address="busy:1", profile_fingerprint="g"))
    assert caught.value.code is ErrorCode.CONFLICT


async def test_an_incomplete_profile_is_used_only_if_the_node_cannot_be_measured(
    profiler: tuple[FakeProfiler, ProfilerClient],
) -> None:
    fake, client = profiler
    partial = profile()
    partial.incomplete_reason = "node_lost: the node died"
    fake.stored["f"] = partial
    kept = await client.latency(pb.NodeHello(node_id="a", address="busy:1", profile_fingerprint="f"))
    assert kept.num_stages == 1
    await client.latency(pb.NodeHello(node_id="b", address="b:1", profile_fingerprint="f"))
    assert fake.measured == ["busy:1", "b:1"]


async def test_an_incomplete_profile_with_every_operation_is_used_as_it_is(
    profiler: tuple[FakeProfiler, ProfilerClient],
) -> None:
    fake, client = profiler
    partial = profile()
    partial.incomplete_reason = "3 of 60 points were not measured"
    for op in range(profile_pb2.OP_KIND_DECODE, profile_pb2.OP_KIND_WEIGHT_SYNC):
        partial.fits.add(op=op, model="constant", coefficients=[0.25], chosen=True)
    fake.stored["f"] = partial
    await client.latency(pb.NodeHello(node_id="a", address="a:1", profile_fingerprint="f"))
    assert fake.measured == []


async def test_a_stored_profile_of_another_model_or_with_other_content_is_refused(tmp_path: Path) -> None:
    path, known = tmp_path / "p.json", profile()
    known.model = "llama"
    path.write_text(write_artifact(known), encoding="utf-8")
    source = StoredProfile(path)
    assert (await source.latency(pb.NodeHello(node_id="n", model="llama"))).num_stages == 1
    with pytest.raises(LemixError, match=r"n serves 'gpt', profile f-1 is of 'llama'") as caught:
        await source.latency(pb.NodeHello(node_id="n", model="gpt"))
    assert caught.value.code is ErrorCode.CONFLICT
    path.write_text(path.read_text(encoding="utf-8").replace("0.25", "0.125"), encoding="utf-8")
    with pytest.raises(StartupError, match="does not match content_hash"):
        StoredProfile(path)
