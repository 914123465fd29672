"""The scheduler put together: made, started, stopped."""

import asyncio
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from lemix.internal.v1 import scheduler_service_pb2, scheduler_service_pb2_grpc
from services.ledger import Ledger, LedgerUnavailable, StaleToken, open_ledger
from services.runtime.app import StartupError
from services.runtime.clock import Clock
from services.runtime.config import ConfigError
from services.runtime.grpc_client import open_channel
from services.runtime.grpc_server import GrpcServer
from services.scheduler import metrics
from services.scheduler.adapters import AdapterDesk
from services.scheduler.checkpoints import CheckpointDesk
from services.scheduler.config import SchedulerSettings
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.policies import POLICIES
from services.scheduler.core.scheduler import SchedulerCore
from services.scheduler.driver import Driver
from services.scheduler.event_log import EventLog
from services.scheduler.explain.accuracy import Accuracy
from services.scheduler.explain.decisions import Decisions
from services.scheduler.explain.live import LiveTasks
from services.scheduler.explain.signatures import Signatures
from services.scheduler.failover import Failover
from services.scheduler.feeder import Feeder
from services.scheduler.gateways import GatewayRegistry
from services.scheduler.guard import LedgerGuard
from services.scheduler.inbox import Delivered, Inbox, NodeGone
from services.scheduler.nodes import NodeRegistry
from services.scheduler.profiles import ProfilerClient, ProfileSource, StoredProfile
from services.scheduler.quality import QualityGate
from services.scheduler.reprofiler import Reprofiler
from services.scheduler.server import SchedulerServicer
from services.scheduler.training import Training

_log = structlog.get_logger()

_READ_COUNT = 256
_READ_BLOCK_S = 1.0
_METRICS_INTERVAL_S = 1.0
_FINAL_SAVE_TIMEOUT_S = 2.0
_NOT_BACK = "it did not come back after a restart of the scheduler"
#: Leases to wait after the start for nodes that hold work of a predecessor.
_ORPHAN_LEASES = 2.0
#: Leases between two looks at what was read from the ledger and never moved.
_READ_AGAIN_LEASES = 2.0


class SchedulerService:
    """One running scheduler. Make it with `start_scheduler`."""

    def __init__(
        self,
        settings: SchedulerSettings,
        core: SchedulerCore,
        profiles: ProfileSource,
        ledger: Ledger,
        clock: Clock,
        event_log: EventLog | None,
    ) -> None:
        self._settings = settings
        self._core = core
        self._profiles = profiles
        self._ledger = ledger
        self._clock = clock
        self._event_log = event_log
        self._tasks: list[asyncio.Task[None]] = []
        self.guard = LedgerGuard(ledger)
        self.inbox = Inbox(settings.max_queued_events)
        self.checkpoints = CheckpointDesk(timeout_s=settings.checkpoint_timeout_s)
        adapters = AdapterDesk()
        self.nodes = NodeRegistry(
            inbox=self.inbox,
            profiles=profiles,
            clock=clock,
            queue_order=core.queue_order,
            default_slo=settings.core.to_core().default_slo,
            lease_s=settings.node_lease_s,
            max_queued_messages=settings.max_queued_messages,
            checkpoints=self.checkpoints,
            adapters=adapters,
        )
        self.checkpoints.send = adapters.send = self.nodes.send
        self.gateways = GatewayRegistry(
            inbox=self.inbox,
            guard=self.guard,
            nodes=self.nodes,
            default_slo=settings.core.to_core().default_slo,
            max_queued_messages=settings.max_queued_messages,
        )
        self.training = Training(
            guard=self.guard,
            inbox=self.inbox,
            clock=clock,
            max_running=settings.max_running_jobs,
            max_paused=settings.max_paused_jobs,
            max_feedback_backlog=settings.max_feedback_backlog,
            feedback_learning_rate=settings.feedback_learning_rate,
            derive_sync_interval=settings.core.sync_every_steps < 0,
            save_interval_s=settings.job_save_interval_s,
            checkpoints=self.checkpoints,
            adapters=adapters,
        )
        self.quality = QualityGate(jobs=self.training.jobs, desk=self.checkpoints, guard=self.guard)
        self.feeder = Feeder(
            jobs=self.training.jobs,
            lifecycle=self.training.lifecycle,
            guard=self.guard,
            inbox=self.inbox,
            look_ahead=settings.core.max_waiting_training,
        )
        self._reprofiler = self._make_reprofiler()
        self.failover = Failover(self.checkpoints, on=settings.checkpoint_failover)
        live = LiveTasks()
        self._accuracy = Accuracy(live)  # before the decisions
        decisions = Decisions(live, settings.core.policy)
        self.driver = self._make_driver(live)
        self._server = self._make_server(decisions)

    def _make_reprofiler(self) -> Reprofiler | None:
        settings, profiles = self._settings, self._profiles
        if not settings.reprofile_idle_s or not isinstance(profiles, ProfilerClient):
            return None
        return Reprofiler(
            core=self._core,
            profiles=profiles,
            nodes=self.nodes,
            inbox=self.inbox,
            clock=self._clock,
            idle_s=settings.reprofile_idle_s,
            budget_s=settings.reprofile_budget_s,
        )

    def _make_driver(self, live: LiveTasks) -> Driver:
        settings = self._settings
        return Driver(
            core=self._core,
            inbox=self.inbox,
            guard=self.guard,
            nodes=self.nodes,
            gateways=self.gateways,
            jobs=self.training.progress,
            failover=self.failover,
            clock=self._clock,
            event_log=self._event_log,
            live=live,
            signatures=Signatures(live, settings.core.to_core().default_slo),
            node_return_s=settings.node_return_s,
        )

    def _make_server(self, decisions: Decisions) -> GrpcServer:
        servicer = SchedulerServicer(
            core=self._core,
            nodes=self.nodes,
            gateways=self.gateways,
            training=self.training,
            checkpoints=self.checkpoints,
            quality=self.quality,
            guard=self.guard,
            clock=self._clock,
            decisions=decisions,
            accuracy=self._accuracy,
            max_file_examples=self._settings.max_file_examples,
        )
        server = GrpcServer(self._settings.listen)
        server.add(
            scheduler_service_pb2_grpc.add_SchedulerServiceServicer_to_server,
            servicer,
            scheduler_service_pb2.DESCRIPTOR.services_by_name["SchedulerService"].full_name,
        )
        return server

    @property
    def address(self) -> str:
        """host:port of the gRPC server."""
        return self._server.address

    async def start(self) -> None:
        """Listen, take over, and take up what a predecessor left.

        Raises StartupError when the port is taken (then nothing was taken over) or the ledger does not answer.
        """
        await self._server.start()
        try:
            token = await self._ledger.acquire_leadership()
            orphaned = await self._ledger.node_ids()
        except LedgerUnavailable as error:
            raise StartupError(str(error)) from error
        await self.training.lifecycle.resume()  # before any node tells of micro-batches
        self.driver.lead(token)
        self.nodes.lead(token)
        changed = asyncio.Event()
        self.guard.on_change = lambda available: changed.set()
        for name, work in self._loops(changed, orphaned).items():
            self._tasks.append(asyncio.create_task(work, name=name))
        await self._server.set_ready(True)

    def _loops(self, changed: asyncio.Event, orphaned: list[str]) -> dict[str, Coroutine[Any, Any, None]]:
        return {
            "driver": self.driver.run(),
            "ledger reader": self._read_ledger(),
            "feeder": self.feeder.run(),
            "job saver": self.training.jobs.run_saver(),
            "health": self._report_health(changed),
            "metrics": self._report_metrics(),
            "orphans": self._reclaim(orphaned),
            **({} if self._reprofiler is None else {"reprofiler": self._reprofiler.run()}),
        }

    async def run_until(self, stop: asyncio.Event) -> None:
        """Return when `stop` is set. Raises StartupError when another scheduler has taken over, or a loop's error."""
        waiting = asyncio.create_task(stop.wait())
        try:
            # The reclaiming of orphans ends by itself; everything else only by an error.
            pending = {waiting, *self._tasks}
            while not waiting.done():
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done - {waiting}:
                    task.result()
        except StaleToken as error:
            raise StartupError(f"stopped: {error}") from error
        finally:
            waiting.cancel()

    async def stop(self, grace_s: float) -> None:
        """Tell peers, stop the loops, store the newest progress; nodes keep their work."""
        self.nodes.close()
        self.gateways.close()
        self.training.calls.close()
        await self._server.stop(grace_s)
        await self.quality.close()
        await self.failover.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(_FINAL_SAVE_TIMEOUT_S):
                await self.training.jobs.save()
        except (LedgerUnavailable, TimeoutError) as error:
            _log.warning("newest job progress not stored; it will be found in the outcomes", error=str(error))
        if self._event_log is not None:
            await asyncio.to_thread(self._event_log.close)
        await self._profiles.close()
        await self._ledger.close()

    # ------------------------------------------------------------- loops

    async def _read_ledger(self) -> None:
        interval_s = _READ_AGAIN_LEASES * self._settings.node_lease_s
        block_s = min(_READ_BLOCK_S, interval_s)
        again_s = self._clock.monotonic_s() + interval_s
        while True:
            deliveries = await self.guard.until_done(
                lambda: self._ledger.read_global(count=_READ_COUNT, block_s=block_s)
            )
            for delivery in deliveries:
                await self.inbox.put(Delivered(delivery))
            if self._clock.monotonic_s() >= again_s:
                self._ledger.read_global_again()
                again_s = self._clock.monotonic_s() + interval_s

    async def _report_health(self, changed: asyncio.Event) -> None:
        while True:
            await changed.wait()
            changed.clear()
            await self._server.set_ready(self.guard.available)

    async def _report_metrics(self) -> None:
        while True:
            metrics.report(self._core.snapshot())
            metrics.report_predictions(self._core.op_records(), self._accuracy.errors())
            await asyncio.sleep(_METRICS_INTERVAL_S)

    async def _reclaim(self, node_ids: list[str]) -> None:
        """Take the work of nodes back that do not return after a restart of the scheduler."""
        missing = set(node_ids)
        while missing:
            await asyncio.sleep(_ORPHAN_LEASES * self._settings.node_lease_s)
            missing = {node_id for node_id in missing if not self.nodes.is_connected(node_id)}
            for node_id in sorted(missing.difference(self.nodes.joining)):
                missing.discard(node_id)
                held = await self.guard.until_done(partial(self._ledger.unfinished, node_id))
                # Whether it kept checkpoints went with the scheduler that knew it, but for this.
                keeps_checkpoints = any(item.node_keeps_checkpoints for item in held)
                await self.inbox.put(NodeGone(node_id, _NOT_BACK, may_return=keeps_checkpoints))


async def start_scheduler(settings: SchedulerSettings, clock: Clock) -> SchedulerService:
    """Connect, take over and serve.

    Raises ConfigError naming a key whose value the core refuses, and StartupError naming what is missing and how to
    mend it.
    """
    config = settings.core.to_core()
    core = _core(config)
    profiles = _profiles(settings)
    event_log = _event_log(settings.event_log_path, config)
    ledger = await _open_ledger(settings)
    service = SchedulerService(settings, core, profiles, ledger, clock, event_log)
    try:
        await service.start()
    except BaseException:
        await service.stop(0.0)
        raise
    return service


def _core(config: CoreConfig) -> SchedulerCore:
    try:
        return SchedulerCore(config)
    except ValueError as error:
        key = "policy_options" if config.policy in POLICIES else "policy"
        raise ConfigError(f"core.{key}: {error}") from error


def _profiles(settings: SchedulerSettings) -> ProfileSource:
    if settings.profile_path:
        if settings.reprofile_idle_s:
            raise StartupError("reprofile_idle_s needs profiler_address and no profile_path: it measures nodes again")
        return StoredProfile(Path(settings.profile_path))
    if not settings.profiler_address:
        raise StartupError("set profiler_address, or profile_path to a stored profile: nodes need a latency model")
    return ProfilerClient(open_channel(settings.profiler_address), measure_timeout_s=settings.profile_timeout_s)


async def _open_ledger(settings: SchedulerSettings) -> Ledger:
    try:
        return await open_ledger(
            settings.redis_url,
            operation_timeout_s=settings.ledger_timeout_s,
            result_ttl_s=settings.result_ttl_s,
            retention_s=settings.retention_s,
        )
    except (LedgerUnavailable, ValueError) as error:
        raise StartupError(f"redis_url: {error}") from error


def _event_log(path: str, config: CoreConfig) -> EventLog | None:
    if not path:
        return None
    try:
        return EventLog(Path(path), config)
    except OSError as error:
        raise StartupError(f"event_log_path: cannot write {path}: {error.strerror}") from error
