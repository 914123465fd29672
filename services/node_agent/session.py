"""The node's long-lived stream to the scheduler. The node keeps working while the scheduler is away."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import grpc
import grpc.aio
import structlog

from lemix.errors import LemixError
from lemix.internal.v1 import scheduler_service_pb2 as scheduler_pb2
from lemix.internal.v1 import scheduler_service_pb2_grpc as scheduler_grpc
from lemix.internal.v1 import work_pb2
from services.node_agent import metrics
from services.runtime.clock import Clock

if TYPE_CHECKING:
    from lemix.internal.v1.scheduler_service_pb2_grpc import SchedulerServiceAsyncStub

    Call = grpc.aio.StreamStreamCall[scheduler_pb2.NodeSessionRequest, scheduler_pb2.NodeSessionResponse]

_log = structlog.get_logger()

_RECONNECT_FIRST_S = 0.1
_RECONNECT_MAX_S = 2.0
_MAX_TRACES = 8192
_MAX_REPORTS = 4096
_MAX_TRACES_PER_BATCH = 512


class Commands(Protocol):
    """What the scheduler can tell the node. Must not block."""

    def on_welcome(self, welcome: scheduler_pb2.NodeWelcome) -> None:
        """The scheduler took the node in. Raises ValueError when the node must not follow this scheduler."""

    def on_cancel(self, task_id: str) -> None:
        """Drop a task."""

    def on_take_snapshot(self, command: scheduler_pb2.TakeSnapshot) -> None:
        """Phase one of a synchronisation."""

    def on_apply_weights(self, command: scheduler_pb2.ApplyWeights) -> None:
        """Phase two of a synchronisation."""

    def on_forget_adapter(self, adapter_id: str) -> None:
        """Nobody may use an adapter any more."""

    def on_evaluate(self, command: scheduler_pb2.EvaluateCommand) -> None:
        """Measure the loss on held-out examples."""

    def on_checkpoint(self, command: scheduler_pb2.CheckpointCommand) -> None:
        """Save, restore or export a checkpoint."""


@dataclass(frozen=True, slots=True)
class Vitals:
    """What a heartbeat carries."""

    weight_step: int
    kv_used_tokens: int
    draining: bool = False
    #: Seconds since the newest optimizer step in the weights; None: never trained.
    weights_age_s: float | None = None
    adapters: tuple[scheduler_pb2.HeldAdapter, ...] = ()
    #: Whether the weights are no longer those of the model directory.
    weights_changed: bool = False


class SchedulerSession:
    """Reports to the scheduler and follows its commands; connects again, with backoff, whenever the stream ends.

    Reports are kept while the scheduler is away. Both buffers are bounded and drop their oldest, counted: traces only
    calibrate, and every outcome is in the ledger before it is reported.
    """

    def __init__(
        self,
        *,
        channel: grpc.aio.Channel,
        hello: Callable[[], scheduler_pb2.NodeHello],
        vitals: Callable[[], Vitals],
        commands: Commands,
        clock: Clock,
        trace_flush_s: float,
        welcome_timeout_s: float,
    ) -> None:
        self._stub: SchedulerServiceAsyncStub = scheduler_grpc.SchedulerServiceStub(channel)
        self._hello = hello
        self._vitals = vitals
        self._commands = commands
        self._clock = clock
        self._trace_flush_s = trace_flush_s
        self._welcome_timeout_s = welcome_timeout_s
        self._traces: deque[scheduler_pb2.OpTrace] = deque()
        self._reports: deque[scheduler_pb2.NodeSessionRequest] = deque()
        #: Something must leave now; something has left.
        self._wake = asyncio.Event()
        self._sent = asyncio.Event()
        self._is_heartbeat_due = False
        self._are_traces_due = False
        self._traces_sent_s = -trace_flush_s
        self._trace_timer: asyncio.TimerHandle | None = None
        #: Whether the scheduler has welcomed the node on the stream of now, and the opposite to wait for.
        self.connected = False
        self.away = asyncio.Event()

    # ------------------------------------------------------------- reports

    def add_trace(self, trace: scheduler_pb2.OpTrace) -> None:
        """Report a finished op, together with others."""
        if len(self._traces) >= _MAX_TRACES:
            self._traces.popleft()
            metrics.TRACES_DROPPED.inc()
        self._traces.append(trace)
        if len(self._traces) >= _MAX_TRACES_PER_BATCH:
            self._flush_traces()
        elif self._trace_timer is None:
            wait_s = self._traces_sent_s + self._trace_flush_s - self._clock.monotonic_s()
            self._trace_timer = asyncio.get_running_loop().call_later(max(0.0, wait_s), self._flush_traces)

    def _flush_traces(self) -> None:
        self._are_traces_due = True
        self._wake.set()

    def report_outcome(self, outcome: work_pb2.WorkOutcome) -> None:
        """Report the end of a task; it is in the ledger already."""
        self._report(scheduler_pb2.NodeSessionRequest(outcome=outcome))

    def report_vitals(self) -> None:
        """Send a heartbeat now."""
        self._is_heartbeat_due = True
        self._wake.set()

    def report_sync(self, finished: scheduler_pb2.SyncFinished) -> None:
        """Report the end of a phase of a synchronisation."""
        self._report(scheduler_pb2.NodeSessionRequest(sync_finished=finished))

    def report_trained(self, outcome: work_pb2.WorkOutcome) -> None:
        """Report a micro-batch that is trained and in no checkpoint."""
        self._report(scheduler_pb2.NodeSessionRequest(trained=outcome))

    def report_checkpoint(self, report: scheduler_pb2.CheckpointReport) -> None:
        """Report what became of a checkpoint."""
        self._report(scheduler_pb2.NodeSessionRequest(checkpoint=report))

    def report_evaluation(self, report: scheduler_pb2.EvaluationReport) -> None:
        """Report a loss on held-out examples."""
        self._report(scheduler_pb2.NodeSessionRequest(evaluation=report))

    def _report(self, message: scheduler_pb2.NodeSessionRequest) -> None:
        if len(self._reports) >= _MAX_REPORTS:
            self._reports.popleft()
            metrics.REPORTS_DROPPED.inc()
        self._reports.append(message)
        self._wake.set()

    async def wait_told(self) -> None:
        """Until nothing waits to be reported."""
        while self._reports or self._traces:
            self._sent.clear()
            await self._sent.wait()

    # ------------------------------------------------------------- the stream

    async def run(self) -> None:
        """Keep a stream to the scheduler until cancelled."""
        delay_s = _RECONNECT_FIRST_S
        while True:
            try:
                await self._session()
                _log.warning("the scheduler ended the session")
            except grpc.aio.AioRpcError as error:
                _log.warning("no session with the scheduler", error=str(LemixError.from_rpc(error)))
            except (TimeoutError, ValueError, asyncio.InvalidStateError) as error:
                _log.warning("no session with the scheduler", error=f"{type(error).__name__}: {error}")
            delay_s = _RECONNECT_FIRST_S if self.connected else min(2 * delay_s, _RECONNECT_MAX_S)
            self.connected = False
            self.away.set()
            await asyncio.sleep(delay_s)

    async def _session(self) -> None:
        call: Call = self._stub.NodeSession(wait_for_ready=True)
        try:
            async with asyncio.timeout(self._welcome_timeout_s):
                await call.write(scheduler_pb2.NodeSessionRequest(hello=self._hello()))
                first = await call.read()
            if not isinstance(first, scheduler_pb2.NodeSessionResponse):
                return
            if not first.HasField("welcome"):
                raise ValueError(f"the scheduler began with {first.WhichOneof('message')} instead of a welcome")
            self._commands.on_welcome(first.welcome)
            self.connected = True
            self.away.clear()
            _log.info("joined", fencing_token=first.welcome.fencing_token, lease_s=first.welcome.lease_s)
            await self._talk(call, first.welcome.lease_s / 4)
        finally:
            call.cancel()

    async def _talk(self, call: "Call", heartbeat_s: float) -> None:
        """Send and receive until either ends."""
        sender = asyncio.create_task(self._send(call, heartbeat_s))
        try:
            while isinstance(message := await call.read(), scheduler_pb2.NodeSessionResponse):
                self._follow(message)
        finally:
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError, asyncio.InvalidStateError, grpc.aio.AioRpcError):
                await sender

    def _follow(self, message: scheduler_pb2.NodeSessionResponse) -> None:
        match message.WhichOneof("message"):
            case "cancel":
                self._commands.on_cancel(message.cancel.task_id)
            case "take_snapshot":
                self._commands.on_take_snapshot(message.take_snapshot)
            case "apply_weights":
                self._commands.on_apply_weights(message.apply_weights)
            case "checkpoint":
                self._commands.on_checkpoint(message.checkpoint)
            case "forget_adapter":
                self._commands.on_forget_adapter(message.forget_adapter.adapter_id)
            case "evaluate":
                self._commands.on_evaluate(message.evaluate)
            case other:
                _log.warning("unknown command", command=other)

    async def _send(self, call: "Call", heartbeat_s: float) -> None:
        self._is_heartbeat_due = True
        beating = asyncio.create_task(self._beat(heartbeat_s))
        try:
            while True:
                while self._is_heartbeat_due or self._reports or self._are_traces_due:
                    await self._send_next(call)
                self._wake.clear()
                await self._wake.wait()
        finally:
            beating.cancel()

    async def _beat(self, heartbeat_s: float) -> None:
        while True:
            await asyncio.sleep(heartbeat_s)
            self._is_heartbeat_due = True
            self._wake.set()

    async def _send_next(self, call: "Call") -> None:
        """One message: what is due, and with it the traces that wait. An outcome never overtakes a trace."""
        message, report = scheduler_pb2.NodeSessionRequest(), None
        self._add_traces(message)
        if self._is_heartbeat_due:
            self._is_heartbeat_due = False
            message.heartbeat.CopyFrom(self._heartbeat())
        elif self._reports and not self._traces:
            report = self._reports.popleft()
            message.MergeFrom(report)
        try:
            await call.write(message)
            self._sent.set()
        except BaseException:
            if report is not None:
                self._reports.appendleft(report)  # for the next stream
            raise

    def _add_traces(self, message: scheduler_pb2.NodeSessionRequest) -> None:
        if self._trace_timer is not None:
            self._trace_timer.cancel()
            self._trace_timer = None
        if self._traces:
            count = min(len(self._traces), _MAX_TRACES_PER_BATCH)
            message.traces.ops.extend([self._traces.popleft() for _ in range(count)])
            self._traces_sent_s = self._clock.monotonic_s()
        self._are_traces_due = bool(self._traces)

    def _heartbeat(self) -> scheduler_pb2.NodeHeartbeat:
        vitals = self._vitals()
        return scheduler_pb2.NodeHeartbeat(
            sent_monotonic_s=self._clock.monotonic_s(),
            weight_step=vitals.weight_step,
            kv_used_tokens=vitals.kv_used_tokens,
            draining=vitals.draining,
            weights_age_s=vitals.weights_age_s,
            adapters=vitals.adapters,
            weights_changed=vitals.weights_changed,
        )
