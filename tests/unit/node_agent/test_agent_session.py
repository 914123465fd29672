"""What a node keeps for a scheduler that is away."""

import asyncio

import grpc.aio
import prometheus_client
import pytest

from lemix.internal.v1 import scheduler_service_pb2 as scheduler_pb2
from lemix.internal.v1 import work_pb2
from services.node_agent import session as session_module
from services.node_agent.session import SchedulerSession, Vitals
from services.runtime.clock import FakeClock


class _NoCommands:
    def on_welcome(self, welcome: scheduler_pb2.NodeWelcome) -> None:
        raise AssertionError(welcome)

    def on_cancel(self, task_id: str) -> None:
        raise AssertionError(task_id)

    def on_take_snapshot(self, sync_id: str) -> None:
        raise AssertionError(sync_id)

    def on_apply_weights(self, command: scheduler_pb2.ApplyWeights) -> None:
        raise AssertionError(command)


class _Call:
    """The sending half of a stream; the write after `good` ones fails."""

    def __init__(self, good: int) -> None:
        self.good = good
        self.messages: list[scheduler_pb2.NodeSessionRequest] = []
        self.written: asyncio.Queue[scheduler_pb2.NodeSessionRequest] = asyncio.Queue()

    async def write(self, message: scheduler_pb2.NodeSessionRequest) -> None:
        if len(self.messages) >= self.good:
            raise ConnectionError("cut")
        self.messages.append(message)
        self.written.put_nowait(message)


@pytest.fixture
async def session():
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        yield SchedulerSession(
            channel=channel,
            hello=scheduler_pb2.NodeHello,
            vitals=lambda: Vitals(3, 17),
            commands=_NoCommands(),
            clock=FakeClock(monotonic_s=5.0),
            trace_flush_s=0.0,
            welcome_timeout_s=1.0,
        )


def _outcome(task_id: str) -> work_pb2.WorkOutcome:
    return work_pb2.WorkOutcome(task_id=task_id)


def _dropped(name: str) -> float:
    return prometheus_client.REGISTRY.get_sample_value(name) or 0.0


async def _send(session: SchedulerSession, good: int) -> list[scheduler_pb2.NodeSessionRequest]:
    call = _Call(good)
    with pytest.raises(ConnectionError):
        await session._send(call, heartbeat_s=100.0)  # type: ignore[arg-type]
    return call.messages


def _stages(message: scheduler_pb2.NodeSessionRequest) -> list[int]:
    return [trace.stage for trace in message.traces.ops]


async def test_a_heartbeat_goes_first_and_takes_the_traces_along(session: SchedulerSession) -> None:
    session.report_outcome(_outcome("a"))
    for stage in range(3):
        session.add_trace(scheduler_pb2.OpTrace(stage=stage))
    session.report_outcome(_outcome("b"))
    first, second = await _send(session, 2)
    assert first.heartbeat == scheduler_pb2.NodeHeartbeat(sent_monotonic_s=5.0, weight_step=3, kv_used_tokens=17)
    assert _stages(first) == [0, 1, 2]
    assert second.outcome.task_id == "a"


async def test_traces_travel_with_the_outcome_they_led_to(session: SchedulerSession) -> None:
    call = _Call(2)
    sending = asyncio.create_task(session._send(call, heartbeat_s=100.0))  # type: ignore[arg-type]
    await call.written.get()
    session.add_trace(scheduler_pb2.OpTrace(stage=7))
    session.report_outcome(_outcome("a"))
    session.report_outcome(_outcome("cut"))
    with pytest.raises(ConnectionError):
        await sending
    assert call.messages[1].outcome.task_id == "a"
    assert _stages(call.messages[1]) == [7]


async def test_a_trace_without_company_leaves_by_itself(session: SchedulerSession) -> None:
    call = _Call(2)
    sending = asyncio.create_task(session._send(call, heartbeat_s=100.0))  # type: ignore[arg-type]
    await call.written.get()
    session.add_trace(scheduler_pb2.OpTrace(stage=7))
    async with asyncio.timeout(5.0):
        message = await call.written.get()
    sending.cancel()
    assert _stages(message) == [7]
    assert message.WhichOneof("message") is None


async def test_a_report_whose_write_failed_is_sent_on_the_next_stream(session: SchedulerSession) -> None:
    session.report_outcome(_outcome("a"))
    session.report_sync(scheduler_pb2.SyncFinished(sync_id="s"))
    assert len(await _send(session, 1)) == 1
    session.report_outcome(_outcome("b"))
    _, *reports = await _send(session, 3)
    assert [report.WhichOneof("message") for report in reports] == ["outcome", "sync_finished"]
    assert reports[0].outcome.task_id == "a"


async def test_traces_are_cut_into_bounded_batches(session: SchedulerSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "_MAX_TRACES_PER_BATCH", 2)
    for stage in range(5):
        session.add_trace(scheduler_pb2.OpTrace(stage=stage))
    session.report_outcome(_outcome("a"))
    session.report_outcome(_outcome("cut"))
    messages = await _send(session, 3)
    assert [_stages(message) for message in messages] == [[0, 1], [2, 3], [4]]
    assert [message.WhichOneof("message") for message in messages] == ["heartbeat", None, "outcome"]


async def test_buffers_are_bounded_and_count_what_they_drop(
    session: SchedulerSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "_MAX_TRACES", 2)
    monkeypatch.setattr(session_module, "_MAX_REPORTS", 1)
    traces, reports = _dropped("lemix_node_traces_dropped_total"), _dropped("lemix_node_reports_dropped_total")
    for stage in range(3):
        session.add_trace(scheduler_pb2.OpTrace(stage=stage))
    session.report_outcome(_outcome("old"))
    session.report_outcome(_outcome("new"))
    (message,) = await _send(session, 1)
    assert _stages(message) == [1, 2]
    assert [report.outcome.task_id for report in session._reports] == ["new"]
    assert _dropped("lemix_node_traces_dropped_total") == traces + 1
    assert _dropped("lemix_node_reports_dropped_total") == reports + 1
