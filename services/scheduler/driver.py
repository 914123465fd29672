"""Drives the pure core: one queue of messages in, one `core.step` each, its commands performed in order.

All impurity of scheduling is here and in its parts: `arrivals` (work that comes in), `node_work` (what nodes hold),
`performer` (commands) and `endings`. While the ledger is away the driver waits for it: nothing accepted is lost, and
nothing is decided on guesses.
"""

import time

import structlog

from lemix.internal.v1 import work_pb2
from lemix.v1 import errors_pb2
from services.runtime.clock import Clock
from services.scheduler import metrics
from services.scheduler.arrivals import Arrivals
from services.scheduler.core.events import Event, Tick
from services.scheduler.driver_ports import Core, TrainingJobs
from services.scheduler.driver_state import DriverState
from services.scheduler.endings import Endings
from services.scheduler.event_log import EventLog
from services.scheduler.explain.live import LiveTasks
from services.scheduler.explain.signatures import Change, Signature, Signatures
from services.scheduler.failover import Failover
from services.scheduler.gateways import GatewayRegistry
from services.scheduler.guard import LedgerGuard
from services.scheduler.inbox import (
    CancelRequested,
    Delivered,
    Ended,
    Inbox,
    Message,
    NodeArrived,
    NodeGone,
    Offered,
    Told,
    Traced,
    Trained,
)
from services.scheduler.node_work import NodeWork
from services.scheduler.nodes import NodeRegistry
from services.scheduler.performer import Performer

_log = structlog.get_logger()

#: While something goes wrong it is looked at this often, also when nothing happens, seconds.
_LOOK_S = 1.0


class Driver:
    """See the module. `run` until cancelled; raises StaleToken when another scheduler has taken over."""

    def __init__(
        self,
        *,
        core: Core,
        inbox: Inbox,
        guard: LedgerGuard,
        nodes: NodeRegistry,
        gateways: GatewayRegistry,
        jobs: TrainingJobs,
        failover: Failover,
        clock: Clock,
        event_log: EventLog | None = None,
        live: LiveTasks | None = None,
        signatures: Signatures | None = None,
        node_return_s: float = 0.0,
    ) -> None:
        self._core = core
        self._inbox = inbox
        self._clock = clock
        self._state = DriverState(guard=guard, nodes=nodes, gateways=gateways, jobs=jobs, clock=clock)
        self._endings = Endings(self._state, self._step)
        self._arrivals = Arrivals(self._state, self._endings, self._step)
        self._node_work = NodeWork(self._state, self._endings, self._step, failover, node_return_s)
        self._performer = Performer(self._state, self._endings)
        self._event_log = event_log
        self._live = live
        self._signatures = signatures
        for signature in Signature:
            metrics.FAILURE_SIGNATURE.labels(signature.value).set(0)

    @property
    def num_tasks(self) -> int:
        """Tasks the core knows."""
        return len(self._state.tasks)

    def lead(self, token: int) -> None:
        """Sign every move with this fencing token. Before `run`."""
        self._state.token = token

    async def run(self) -> None:
        """Take messages until cancelled."""
        while True:
            message = await self._inbox.get(self._timeout_s())
            if message is None:
                await self._step(Tick())
            else:
                await self._take(message)
            await self._node_work.give_up_away()
            await self._drain()
            await self._arrivals.take_again()

    def _timeout_s(self) -> float | None:
        """How long to wait for a message; None: for ever."""
        wakeup_s = self._node_work.wakeup_s
        core_s = self._core.next_wakeup_s()
        if wakeup_s is None or (core_s is not None and core_s < wakeup_s):
            wakeup_s = core_s
        timeout_s = None if wakeup_s is None else max(0.0, wakeup_s - self._clock.monotonic_s())
        if self._signatures is not None and self._signatures.active:
            return _LOOK_S if timeout_s is None else min(timeout_s, _LOOK_S)
        return timeout_s

    async def _take(self, message: Message) -> None:
        match message:
            case Traced(ops):
                for op in ops:
                    await self._step(op)
            case Delivered(delivery):
                await self._arrivals.delivered(delivery)
            case Offered(item):
                await self._arrivals.offered(item)
            case CancelRequested(task_id):
                await self._arrivals.cancel(task_id)
            case Ended(outcome):
                if self._signatures is not None and _ran_out_of_memory(outcome):
                    self._signatures.memory_failed(self._clock.monotonic_s(), outcome.node_id)
                await self._endings.ended(outcome)
            case Trained(outcome):
                await self._endings.trained(outcome)
            case NodeArrived(spec):
                await self._node_work.arrived(spec)
            case NodeGone():
                await self._node_work.gone(message)
            case Told(event):
                await self._step(event)

    async def _step(self, event: Event) -> None:
        self._state.followups.append(event)
        await self._drain()

    async def _drain(self) -> None:
        while self._state.followups:
            current = self._state.followups.popleft()
            now_s = self._clock.monotonic_s()
            started_s = time.perf_counter()
            commands = self._core.step(now_s, current)
            metrics.DECISION_SECONDS.observe(time.perf_counter() - started_s)
            metrics.EVENTS.labels(type(current).__name__).add()
            if self._event_log is not None:
                self._event_log.add(now_s, current, commands)
            if self._signatures is not None:
                for change in self._signatures.advance(now_s):
                    _announce(change)
            if self._live is not None:
                self._live.add(now_s, current, commands)
            for command in commands:
                metrics.COMMANDS.labels(type(command).__name__).add()
                await self._performer.perform(command)


def _ran_out_of_memory(outcome: work_pb2.WorkOutcome) -> bool:
    ended = outcome.training if outcome.HasField("training") else outcome.inference
    return ended.HasField("error") and ended.error.code == errors_pb2.ERROR_CODE_RESOURCE_EXHAUSTED


def _announce(change: Change) -> None:
    finding = change.finding
    metrics.FAILURE_SIGNATURE.labels(finding.signature.value).set(change.active)
    numbers = {name: round(value, 3) for name, value in finding.numbers.items()}
    if change.active:
        _log.warning("failure begins", signature=finding.signature.value, advice=finding.advice, **numbers)
    else:
        _log.info("failure ended", signature=finding.signature.value, since_s=round(finding.since_s, 3), **numbers)
