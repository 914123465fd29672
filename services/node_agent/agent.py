"""One node, put together: loop, intake, token streams, weights, measurements, session and server."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import node_agent_service_pb2_grpc as node_grpc
from lemix.internal.v1 import scheduler_service_pb2 as scheduler_pb2
from lemix.internal.v1 import work_pb2
from services.ledger import Ledger
from services.node_agent import metrics
from services.node_agent.checkpoint_commands import CheckpointCommands
from services.node_agent.checkpoint_report import CheckpointReports
from services.node_agent.checkpoint_schedule import CheckpointLimits
from services.node_agent.checkpoint_store import CheckpointStore
from services.node_agent.checkpoints import Checkpointer
from services.node_agent.config import NodeAgentSettings
from services.node_agent.core.types import QueueOrder
from services.node_agent.core_config import core_config
from services.node_agent.description import NodeDescription
from services.node_agent.engine.base import Engine
from services.node_agent.evaluation import Evaluator
from services.node_agent.intake import Intake
from services.node_agent.loop import AgentLoop
from services.node_agent.measure import Measurer
from services.node_agent.server import FULL_NAME, NodeAgentServicer
from services.node_agent.session import SchedulerSession
from services.node_agent.stop_texts import StopTexts
from services.node_agent.tokens import TokenHub
from services.node_agent.weights import WeightSync
from services.runtime.app import StartupError
from services.runtime.clock import Clock
from services.runtime.grpc_server import GrpcServer

_log = structlog.get_logger()

#: Longest a stopping node tries to store outcomes, seconds.
_FLUSH_S = 2.0
#: Held-out losses asked for at once.
_MAX_EVALUATIONS = 8


class NodeAgent:
    """A running node. Implements what the loop reports to and what the scheduler commands.

    `start` listens and joins; `broken` is set with an exception when the node cannot go on; `stop` leaves everything
    unfinished in the ledger.
    """

    def __init__(
        self,
        *,
        settings: NodeAgentSettings,
        engine: Engine,
        ledger: Ledger,
        scheduler: grpc.aio.Channel,
        fingerprint: str,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._clock = clock
        store = _checkpoint_store(settings)
        # Rises with every start; the lower 32 bits of the seconds will do so until the year 2106.
        self.incarnation = int(clock.unix_s()) & 0xFFFFFFFF
        if store is not None:
            self.incarnation = max(self.incarnation, store.newest_incarnation() + 1)
        self._server = GrpcServer(settings.listen)
        self._hub = TokenHub(clock, settings.token_ttl_s, settings.token_flush_s)
        self._loop = AgentLoop(
            node_id=settings.node_id,
            incarnation=self.incarnation,
            workers=engine.workers,
            config=core_config(settings, engine.info),
            clock=clock,
            listener=self,
            op_timeout_s=settings.op_timeout_s,
            max_optimizer_states=settings.max_optimizer_states,
            max_adapters=settings.max_adapters,
        )
        self._session = self._open_session(scheduler)
        self._checkpoints: Checkpointer | None = None
        self._checkpoint_commands: CheckpointCommands | None = None
        if store is not None:
            reports = CheckpointReports(store, self._loop, self.incarnation, self._session.report_checkpoint)
            self._checkpoints = self._checkpointer(store, reports)
            self._checkpoint_commands = CheckpointCommands(self._checkpoints, store, reports)
        self._description = self._describe(engine, fingerprint)
        self._intake = Intake(
            node_id=settings.node_id,
            ledger=ledger,
            loop=self._loop,
            hub=self._hub,
            info=engine.info,
            stops=StopTexts(Path(settings.model_path), engine.info.eos_token_ids),
            clock=clock,
            max_tasks=settings.max_inflight_inference + settings.max_queued_training,
            max_training_parts=settings.max_training_parts,
            report=self._session.report_outcome,
            checkpoints=self._checkpoints,
        )
        self._weights = WeightSync(
            loop=self._loop,
            address=lambda: self.address,
            report=self._session.report_sync,
            timeout_s=settings.sync_timeout_s,
            checkpoints=self._checkpoints,
        )
        self._loop.adapters.on_change = self._session.report_vitals
        self._measurer = Measurer(self._loop, engine.info)
        self._welcomed = asyncio.Event()
        self._evaluator = Evaluator(self._loop, engine.info)
        self._evaluations: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._draining = False

    def _open_session(self, scheduler: grpc.aio.Channel) -> SchedulerSession:
        return SchedulerSession(
            channel=scheduler,
            hello=lambda: self._description.hello(),
            vitals=lambda: self._description.vitals(draining=self._draining),
            commands=self,
            clock=self._clock,
            trace_flush_s=self._settings.trace_flush_s,
            welcome_timeout_s=self._settings.welcome_timeout_s,
        )

    def _describe(self, engine: Engine, fingerprint: str) -> NodeDescription:
        return NodeDescription(
            settings=self._settings,
            engine=engine,
            loop=self._loop,
            checkpoints=self._checkpoints,
            incarnation=self.incarnation,
            fingerprint=fingerprint,
            address=lambda: self.address,
            clock=self._clock,
        )

    def _checkpointer(self, store: CheckpointStore, reports: CheckpointReports) -> Checkpointer:
        settings = self._settings
        limits = CheckpointLimits(
            every_steps=settings.checkpoint_every_steps,
            every_s=settings.checkpoint_every_s,
            max_unsaved=settings.max_unsaved_microbatches,
            give_up_s=settings.checkpoint_give_up_s,
        )
        return Checkpointer(
            store=store,
            loop=self._loop,
            incarnation=self.incarnation,
            clock=self._clock,
            limits=limits,
            finish=lambda outcome: self._intake.finish(outcome),
            reports=reports,
        )

    # ------------------------------------------------------------- life cycle

    @property
    def address(self) -> str:
        """host:port told to others."""
        return self._settings.advertise or self._server.address

    @property
    def broken(self) -> asyncio.Future[None]:
        """Ends with NodeBroken when the node cannot go on."""
        return self._loop.broken

    async def start(self) -> None:
        """Listen, go on from the newest checkpoint, then join the scheduler.

        Raises StartupError when the port is taken, or the checkpoints are of another model or cannot be loaded.
        """
        servicer = NodeAgentServicer(
            hub=self._hub, weights=self._weights, measurer=self._measurer, node_info=self._description.node_info
        )
        self._server.add(node_grpc.add_NodeAgentServiceServicer_to_server, servicer, FULL_NAME)
        await self._server.start()
        self._loop.start()
        if self._checkpoints is not None:
            await _restore(self._checkpoints)
        await self._server.set_ready(True)
        _log.info("listening", address=self._server.address)
        loops = [self._session.run(), self._take_work(), self._intake.run_finisher(), self._watch()]
        if self._checkpoints is not None:
            loops.append(self._checkpoints.run())
        for work in loops:
            task = asyncio.create_task(work)
            task.add_done_callback(self._task_ended)
            self._tasks.append(task)

    async def drain(self) -> None:
        """Get nothing new and finish what is here, for at most `drain_s`, or while there is a scheduler: without one
        nobody would stop sending work."""
        if not self._session.connected or not self._settings.drain_s:
            return
        self._draining = True
        self._session.report_vitals()
        _log.info("draining", longest_s=self._settings.drain_s)
        ends: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(self._finish_all()),
            asyncio.ensure_future(self._session.away.wait()),
            self.broken,
        ]
        await asyncio.wait(ends, timeout=self._settings.drain_s, return_when=asyncio.FIRST_COMPLETED)
        for future in ends[:2]:
            future.cancel()

    async def _finish_all(self) -> None:
        """Until every task has its outcome in the ledger and the scheduler has been told."""
        await self._intake.wait_empty()
        if self._checkpoints is not None and self._checkpoints.num_unsaved:
            try:
                await self._checkpoints.save("shutdown")
            except LemixError:
                # It was reported. What no checkpoint has is trained again by whoever restores the one before.
                return
            await self._intake.wait_empty()
        await self._session.wait_told()

    async def stop(self) -> None:
        """Leave the session, take nothing more, close the server. Tasks are not ended: they stay in the ledger."""
        self._stopping = True
        running = [*self._tasks, *self._evaluations]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._loop.stop()
        if self._checkpoint_commands is not None:
            await self._checkpoint_commands.close()
        await self._intake.flush(_FLUSH_S)
        self._hub.end_all()
        await self._server.stop(self._settings.shutdown_grace_s)
        await self._weights.close()

    async def _take_work(self) -> None:
        """Begin when the scheduler has welcomed the node: before, it may still want to measure it."""
        await self._welcomed.wait()
        await self._intake.run_reader()

    async def _watch(self) -> None:
        """Keep the gauges up to date."""
        while True:
            state = self._loop.snapshot()
            node = self._settings.node_id
            metrics.KV_USED_TOKENS.labels(node).set(state.kv_used_tokens)
            metrics.WAITING.labels(node, "inference").set(state.waiting_requests)
            metrics.WAITING.labels(node, "training").set(state.waiting_microbatches)
            metrics.WEIGHT_STEP.labels(node).set(state.versions[0])
            metrics.UNSAVED.labels(node).set(0 if self._checkpoints is None else self._checkpoints.num_unsaved)
            for stage, length in enumerate(state.queue_lengths):
                metrics.QUEUE_LENGTH.labels(node, stage).set(length)
            await asyncio.sleep(1.0)

    def _task_ended(self, task: "asyncio.Task[None]") -> None:
        """None of the node's tasks ends by itself; one that does, in whatever way, must not go unnoticed."""
        if not self._stopping:
            error = None if task.cancelled() else task.exception()
            self._loop.fail(error or RuntimeError("a task of the node ended"))

    # ------------------------------------------------------------- what the loop reports

    def on_tokens(
        self, task_id: str, token_ids: Sequence[int], logprobs: Sequence[work_pb2.TokenLogprobs] = ()
    ) -> None:
        """See loop_ports.Listener."""
        self._hub.append(task_id, token_ids, logprobs)

    def on_trace(self, trace: scheduler_pb2.OpTrace) -> None:
        """See loop_ports.Listener."""
        self._session.add_trace(trace)

    def on_outcome(self, outcome: work_pb2.WorkOutcome) -> None:
        """See loop_ports.Listener."""
        if outcome.HasField("inference"):
            self._hub.finish(outcome.task_id, outcome.inference)
        elif self._checkpoints is not None and not outcome.training.HasField("error"):
            self._checkpoints.hold_back(outcome)
            self._intake.held_back()
            self._session.report_trained(outcome)
            return
        self._intake.finish(outcome)

    # ------------------------------------------------------------- what the scheduler commands

    def on_welcome(self, welcome: scheduler_pb2.NodeWelcome) -> None:
        """See session.Commands."""
        if welcome.fencing_token < self._intake.newest_token:
            newest = self._intake.newest_token
            raise ValueError(f"the scheduler's token {welcome.fencing_token} is older than {newest}")
        if welcome.lease_s <= 0:
            raise ValueError(f"a lease of {welcome.lease_s} s makes no sense")
        # A part that is absent reads as 0.
        slo = welcome.default_slo
        self._loop.set_queue_order(QueueOrder(welcome.queue_order), slo.ttft_s, slo.tpot_s)
        self._intake.newest_token = welcome.fencing_token
        if self._checkpoints is not None:
            for outcome in self._checkpoints.unsaved():
                self._session.report_trained(outcome)
        self._welcomed.set()

    def on_cancel(self, task_id: str) -> None:
        """See session.Commands."""
        self._intake.cancel(task_id)

    def on_take_snapshot(self, command: scheduler_pb2.TakeSnapshot) -> None:
        """See session.Commands."""
        self._weights.start_snapshot(command)

    def on_apply_weights(self, command: scheduler_pb2.ApplyWeights) -> None:
        """See session.Commands."""
        self._weights.start_apply(command)

    def on_forget_adapter(self, adapter_id: str) -> None:
        """See session.Commands."""
        self._loop.forget_adapter(adapter_id)

    def on_evaluate(self, command: scheduler_pb2.EvaluateCommand) -> None:
        """See session.Commands."""
        if len(self._evaluations) >= _MAX_EVALUATIONS:
            error = LemixError(ErrorCode.OVERLOADED, "this node measures other held-out losses")
            report = scheduler_pb2.EvaluationReport(request_id=command.request_id, error=error.to_proto())
            self._session.report_evaluation(report)
            return
        task = asyncio.create_task(self._evaluate(command))
        self._evaluations.add(task)
        task.add_done_callback(self._evaluations.discard)

    async def _evaluate(self, command: scheduler_pb2.EvaluateCommand) -> None:
        self._session.report_evaluation(await self._evaluator.evaluate(command))

    def on_checkpoint(self, command: scheduler_pb2.CheckpointCommand) -> None:
        """See session.Commands."""
        if self._checkpoint_commands is not None:
            self._checkpoint_commands.start(command)
            return
        error = LemixError(ErrorCode.CONFLICT, f"node {self._settings.node_id} keeps no checkpoints")
        report = scheduler_pb2.CheckpointReport(request_id=command.request_id, error=error.to_proto())
        self._session.report_checkpoint(report)


def _checkpoint_store(settings: NodeAgentSettings) -> CheckpointStore | None:
    """Raises StartupError naming a directory that cannot be used."""
    if not settings.checkpoint_directory:
        return None
    try:
        directory, model_path = Path(settings.checkpoint_directory), Path(settings.model_path)
        store = CheckpointStore(directory, settings.node_id, model_path, keep=settings.checkpoint_keep)
        store.prepare()
    except (OSError, ValueError) as error:
        raise StartupError(f"checkpoint_directory {settings.checkpoint_directory}: {error}") from error
    return store


async def _restore(checkpoints: Checkpointer) -> None:
    try:
        await checkpoints.restore_newest()
    except LemixError as error:
        advice = "name another checkpoint_directory, or remove it there, to begin from the model directory"
        raise StartupError(f"{error.message}; {advice}") from error
