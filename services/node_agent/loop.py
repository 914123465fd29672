"""The agent's loop: events into the node core, its commands to the stage workers, results back as events.

Everything here runs on one asyncio loop and `_step` never awaits, so events reach the core one at a time and in order.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence

import structlog

from lemix.errors import ErrorCode, LemixError
from services.latency import MOVES, OpKind
from services.node_agent import metrics
from services.node_agent.adapters import NodeAdapters
from services.node_agent.convert import outcome_to_proto, trace_to_proto
from services.node_agent.core.node import NodeCore
from services.node_agent.core.types import (
    Cancelled,
    Command,
    Event,
    FreeKv,
    InferenceRequest,
    MicrobatchArrived,
    NodeCoreConfig,
    NodeSnapshot,
    Op,
    OpDone,
    QueueOrder,
    RequestArrived,
    RunOp,
    SyncRequested,
    TaskDone,
    Tick,
    TrainingMicrobatch,
)
from services.node_agent.engine.base import StageResult, StageWorker
from services.node_agent.engine.ops import Forget, Offload, Reload
from services.node_agent.engine.training_ops import AdapterSpec, OptimizerSpec
from services.node_agent.loop_ports import Listener, NodeBroken
from services.node_agent.op_results import OpResults, count, unusable
from services.node_agent.payloads import PayloadBuilder
from services.node_agent.stage_runner import AGENT_OP_ID, StageRunner
from services.node_agent.tasks import MicrobatchTask, RequestTask, Task
from services.node_agent.wakeup import Wakeup
from services.node_agent.weight_ages import WeightAges
from services.node_agent.weight_ops import WeightOp, WeightOps
from services.runtime.clock import Clock

_log = structlog.get_logger()


class AgentLoop:
    """Owns the node core and the stage runners of one node."""

    def __init__(
        self,
        *,
        node_id: str,
        incarnation: int,
        workers: Sequence[StageWorker],
        config: NodeCoreConfig,
        clock: Clock,
        listener: Listener,
        op_timeout_s: float,
        max_optimizer_states: int,
        max_adapters: int = 16,
    ) -> None:
        self.node_id = node_id
        self.ages = WeightAges()
        self.adapters = NodeAdapters(max_adapters)
        #: Set with a NodeBroken when the node cannot go on.
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._clock = clock
        self._listener = listener
        self._core = NodeCore(config)
        self._tasks: dict[str, Task] = {}
        self._payloads = PayloadBuilder(self._tasks, config.num_stages, max_optimizer_states)
        # What one task gave up is what the next op of another takes.
        forgets_first = config.memory is not None or config.expected_output_tokens > 0
        self._runners = [
            StageRunner(
                stage,
                worker,
                self.fail,
                op_timeout_s=op_timeout_s,
                forgets_first=forgets_first,
            )
            for stage, worker in enumerate(workers)
        ]
        self._weight_ops = WeightOps(config.num_stages, self.ages)
        self._results = OpResults(
            node_id=node_id,
            incarnation=incarnation,
            tasks=self._tasks,
            adapters=self.adapters,
            ages=self.ages,
            clock=clock,
            listener=listener,
        )
        # What waits for a measurement; None when none runs.
        self._held: list[Callable[[], None]] | None = None
        #: What the core is to be ordered by once it is idle; None: as it is.
        self._reordered: NodeCoreConfig | None = None
        self._wakeup = Wakeup(clock, lambda: self._feed(Tick()))

    # ------------------------------------------------------------- life cycle

    def start(self) -> None:
        """Begin to run ops."""
        for runner in self._runners:
            runner.start()

    async def stop(self) -> None:
        """Stop without ending any task: what is unfinished stays in the ledger."""
        self._wakeup.cancel()
        for runner in self._runners:
            runner.stop()
        self._weight_ops.cancel()
        if not self.broken.done():
            self.broken.cancel()

    def fail(self, error: BaseException) -> None:
        """Give the node up: `broken` ends with the first such error."""
        if not self.broken.done():
            _log.error("node broken", error=f"{type(error).__name__}: {error}", exc_info=error)
            broken = error if isinstance(error, NodeBroken) else NodeBroken(f"{type(error).__name__}: {error}")
            self.broken.set_exception(broken)

    # ------------------------------------------------------------- work

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return len(self._runners)

    @property
    def runners(self) -> Sequence[StageRunner]:
        """Stage 0 first; for measurements."""
        return self._runners

    @property
    def optimizers(self) -> Mapping[str, OptimizerSpec]:
        """Jobs whose optimizer state the stages keep."""
        return self._payloads.optimizers

    def adopt_optimizers(self, optimizers: Mapping[str, OptimizerSpec]) -> None:
        """The stages have restored these jobs' optimizer states."""
        self._payloads.adopt(optimizers)

    def snapshot(self) -> NodeSnapshot:
        """Counts for heartbeats and metrics."""
        return self._core.snapshot()

    def holds(self, task_id: str) -> bool:
        """Whether this task is on the node and has not ended."""
        return task_id in self._tasks

    def add_request(self, task: RequestTask, request: InferenceRequest) -> None:
        """Take a request. Raises ValueError when its id is live."""
        self._add(task, RequestArrived(request))

    def add_microbatch(self, task: MicrobatchTask, microbatch: TrainingMicrobatch) -> None:
        """Take a micro-batch. Raises ValueError when its id is live."""
        self._add(task, MicrobatchArrived(microbatch))

    def _add(self, task: Task, event: Event) -> None:
        if task.task_id in self._tasks:
            raise ValueError(f"{task.task_id} is on this node already")
        self.adapters.admit(task)
        self._tasks[task.task_id] = task
        self._feed(event)

    def cancel(self, task_id: str) -> bool:
        """Drop a task; it ends as soon as no op holds it. False when it is not on the node."""
        if task_id not in self._tasks:
            return False
        self._feed(Cancelled(task_id))
        return True

    def forget_adapter(self, adapter_id: str) -> None:
        """Cancel what uses an adapter, then let the stages free it."""
        for task_id in self.adapters.unwanted(adapter_id, self._tasks.values()):
            self.cancel(task_id)
        self._free_adapters()

    def give_up_adapter(self, adapter_id: str) -> None:
        """What was to make an adapter has failed."""
        self.adapters.not_made(adapter_id, self._tasks.values())
        self._free_adapters()

    def adopt_adapters(
        self, specs: Iterable[AdapterSpec], *, weights_changed: bool, trained_unix_s: Mapping[str, float]
    ) -> None:
        """The stages have restored these adapters; see NodeAdapters."""
        tasks = self._tasks.values()
        self.adapters.adopt(specs, tasks, weights_changed=weights_changed, trained_unix_s=trained_unix_s)
        self._free_adapters()

    def _free_adapters(self) -> None:
        in_use = self._weight_ops.adapter_ids
        for adapter_id in self.adapters.take_unused(self._tasks.values(), in_use, self._payloads.is_trained):
            _log.info("adapter freed", adapter=adapter_id)
            self._payloads.forget_job(adapter_id)
            for runner in self._runners:
                runner.forget_adapter(adapter_id)

    async def run_weight_op(self, subject: str, weight_op: WeightOp) -> WeightOp:
        """Run a weight operation between ops, at a version boundary; returns it with every stage's result.

        Raises LemixError CONFLICT when one of that name is under way, CANCELLED when an adapter of it was deleted.
        """
        for adapter_id in weight_op.adapter_ids:
            self.adapters.check(adapter_id)
        ended = self._weight_ops.begin(subject, weight_op)
        self._feed(SyncRequested(subject, weight_op.changes_weights, weight_op.settles))
        return await ended

    @contextlib.asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """The stages for oneself; events that come meanwhile wait. Raises LemixError CONFLICT when there is work."""
        if not self._is_idle():
            raise LemixError(ErrorCode.CONFLICT, "the node has work")
        with self._holding():
            yield

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """The stages for oneself as soon as their running ops have ended; all else, the ends of these ops too, waits.
        Raises LemixError CONFLICT during a measurement."""
        with self._holding():
            for runner in self._runners:
                await runner.call(Forget(AGENT_OP_ID, ()))
            yield

    @contextlib.contextmanager
    def _holding(self) -> Iterator[None]:
        if self._held is not None:
            raise LemixError(ErrorCode.CONFLICT, "the node is being measured")
        self._held = []
        try:
            yield
        finally:
            held, self._held = self._held, None
            for resume in held:
                resume()
            self._change_order_when_idle()

    def set_queue_order(self, order: QueueOrder, ttft_s: float | None = None, tpot_s: float | None = None) -> None:
        """Use this order of the stage queues and these default promises, from the moment the node is idle."""
        config = self._core.config.ordered(order, ttft_s, tpot_s)
        self._reordered = config if config != self._core.config else None
        self._change_order_when_idle()

    @property
    def accepts_work(self) -> bool:
        """False while the node drains to change its queue order."""
        return self._reordered is None

    def _is_idle(self) -> bool:
        state = self._core.snapshot()
        return not self._tasks and self._weight_ops.is_idle and not any(state.running_ops)

    def _change_order_when_idle(self) -> None:
        if self._reordered is None or self._held is not None or not self._is_idle():
            return
        config = self._reordered
        self._core = self._core.with_order(config)
        _log.info(
            "queue order", order=str(config.queue_order), ttft_s=config.default_ttft_s, tpot_s=config.default_tpot_s
        )
        self._reordered = None

    # ------------------------------------------------------------- events and commands

    def _feed(self, event: Event) -> None:
        if self._held is not None:
            self._held.append(lambda: self._step(event))
        else:
            self._step(event)

    def _step(self, event: Event) -> None:
        try:
            for command in self._core.step(self._clock.monotonic_s(), event):
                self._perform(command)
        except Exception as error:
            # Whoever fed the event (a timer, a measurement, a command) may not end with it; the node must.
            self.fail(error)
            raise
        self._wakeup.set(self._core.next_wakeup_s)
        if self._reordered is not None:
            self._change_order_when_idle()

    def _perform(self, command: Command) -> None:
        match command:
            case RunOp(stage, op):
                self._run(stage, op)
            case FreeKv(task_id):
                if isinstance(self._tasks.get(task_id), MicrobatchTask):
                    self._payloads.drop(task_id)
                self._results.cache_freed(task_id)
                for runner in self._runners:
                    runner.forget(task_id)
            case TaskDone():
                self._end(command)

    def _run(self, stage: int, op: Op) -> None:
        if op.kind is OpKind.WEIGHT_SYNC:
            payload = self._weight_ops.payload(op)
        elif op.kind in MOVES:
            payload = (Offload if op.kind is OpKind.OFFLOAD else Reload)(op.op_id, op.task_ids)
        else:
            payload = self._payloads.build(op, stage)
        self._runners[stage].submit(payload, lambda result: self._op_ended(stage, op, result))
        if stage == 0 and op.batch:
            metrics.BATCH_SIZE.labels(op.kind).observe(op.batch)

    # ------------------------------------------------------------- results

    def _op_ended(self, stage: int, op: Op, result: StageResult) -> None:
        """Take over what an op produced, then tell the core, whose next ops build on it."""
        if self._held is not None:
            self._held.append(lambda: self._resume(stage, op, result))
            return
        is_last = stage == self.num_stages - 1
        if op.changes_weights and result.version != op.version + 1:
            raise NodeBroken(f"stage {stage} is at version {result.version} after an op that leads to {op.version + 1}")
        error = result.error or unusable(op, result)
        # Its end may free the adapter.
        isolated = self.adapters.is_isolated(op.subject)
        stopped: tuple[str, ...] = ()
        if error:
            self._results.note_failure(stage, op, error)
        elif is_last:
            stopped = self._results.take(op, result)
        if op.kind is OpKind.WEIGHT_SYNC:
            self._weight_ops.ended(stage, op, result)
            self._free_adapters()
        elif op.kind not in MOVES:
            self._payloads.ended(op, stage, result)
            if op.kind is OpKind.OPTIMIZER_STEP:
                self._weight_ops.step_ended(stage, op, error)
            if is_last and op.changes_weights:
                self._stepped(op, failed=bool(error), isolated=isolated)
        self._step(OpDone(stage, op.op_id, stopped, bool(error)))
        # The next ops are on their way by now: nobody waits for what follows.
        count(stage, op, result, failed=bool(error))
        self._listener.on_trace(trace_to_proto(op, stage, result, is_last=is_last, isolated=isolated))

    def _resume(self, stage: int, op: Op, result: StageResult) -> None:
        """An op that ended while the stages were held."""
        try:
            self._op_ended(stage, op, result)
        except Exception as error:
            self.fail(error)
            raise

    def _stepped(self, op: Op, *, failed: bool, isolated: bool) -> None:
        """An optimizer step left the last stage. That of an isolated adapter makes the served model no newer."""
        now_unix_s = self._clock.unix_s()
        if not failed:
            self.adapters.stepped(op.subject, now_unix_s)
        self._free_adapters()
        if failed or isolated:
            self.ages.record(op.version + 1, self.ages.at(op.version))
        else:
            self.ages.record(op.version + 1, now_unix_s, op.subject)

    def _end(self, done: TaskDone) -> None:
        task = self._tasks.pop(done.task_id)
        if done.detail:
            task.error = LemixError(ErrorCode.RESOURCE_EXHAUSTED, done.detail)
        if isinstance(task, RequestTask):
            self._results.request_ended(task)
        kind = "inference" if isinstance(task, RequestTask) else "training"
        metrics.TASKS.labels(kind, done.reason).inc()
        now_s = self._clock.monotonic_s()
        self._listener.on_outcome(outcome_to_proto(task, done.reason, node_id=self.node_id, now_s=now_s))
        if isinstance(task, MicrobatchTask):
            for job_id in self._payloads.jobs_to_forget(task):
                _log.info("optimizer state dropped", job=job_id, complete=job_id == task.job_id and task.last)
                for runner in self._runners:
                    runner.forget(job_id)
            if task.adapter is not None:
                self.adapters.not_made(task.adapter.adapter_id, self._tasks.values())
        self._free_adapters()
