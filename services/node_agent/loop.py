"""The agent's loop: events into the node core, its commands to the stage workers, results back as events.

Everything here runs on one asyncio loop and `_step` never awaits, so events reach the core one at a time and in order.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2, work_pb2
from lemix.v1 import types_pb2
from services.latency import MOVES, OpKind
from services.node_agent import metrics
from services.node_agent.adapters import NodeAdapters
from services.node_agent.convert import logprobs_to_proto, outcome_to_proto, public_error, trace_to_proto
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
from services.node_agent.engine.base import Offload, OptimizerSpec, Reload, StageOp, StageResult, StageWorker
from services.node_agent.payloads import PayloadBuilder
from services.node_agent.stage_runner import StageRunner
from services.node_agent.tasks import MicrobatchTask, RequestTask, Task
from services.node_agent.weight_ages import WeightAges
from services.runtime.clock import Clock

_log = structlog.get_logger()


class NodeBroken(RuntimeError):
    """The node cannot go on (a stage worker died, or its weights no longer belong together). Its work stays in the
    ledger for other nodes."""


class Listener(Protocol):
    """Who is told what happens to tasks. Called in the order of events; must not block."""

    def on_tokens(
        self, task_id: str, token_ids: Sequence[int], logprobs: Sequence[work_pb2.TokenLogprobs] = ()
    ) -> None:
        """A request produced tokens. logprobs: one per token, if it wants them."""

    def on_trace(self, trace: scheduler_service_pb2.OpTrace) -> None:
        """An op ended."""

    def on_outcome(self, outcome: work_pb2.WorkOutcome) -> None:
        """A task ended; once per task."""


@dataclass(slots=True)
class WeightOp:
    """A weight operation on every stage. `payload` makes a stage's op.

    trained: unix time of the newest optimizer step contained, as a function of the time before (applied weights only).
    settles: see SyncRequested.
    """

    changes_weights: bool
    payload: Callable[[Op], StageOp]
    trained: Callable[[float | None], float | None] = lambda before: before
    settles: bool = False
    results: list[StageResult] = field(default_factory=list)
    version: int = 0


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
        self._incarnation = incarnation
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
        # Of the KV caches kept for sessions, by the request that left them: the weights they stem from.
        self._kept_versions: dict[str, list[types_pb2.WeightVersion]] = {}
        self._weight_ops: dict[str, tuple[WeightOp, asyncio.Future[WeightOp]]] = {}
        # Optimizer steps on their way up: whether the stages so far have changed their weights.
        self._steps: dict[int, bool] = {}
        # Events that wait for a measurement; None when none runs.
        self._held: list[Event] | None = None
        self._queue_order: QueueOrder | None = None
        # When the core wants its next tick, and the timer that brings it.
        self._wakeup_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------- life cycle

    def start(self) -> None:
        """Begin to run ops."""
        for runner in self._runners:
            runner.start()

    async def stop(self) -> None:
        """Stop without ending any task: what is unfinished stays in the ledger."""
        if self._timer is not None:
            self._timer.cancel()
        for runner in self._runners:
            runner.stop()
        for _, future in self._weight_ops.values():
            future.cancel()
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

    def _free_adapters(self) -> None:
        for adapter_id in self.adapters.take_unused(self._tasks.values(), self._payloads.is_trained):
            _log.info("adapter freed", adapter=adapter_id)
            self._payloads.forget_job(adapter_id)
            for runner in self._runners:
                runner.forget_adapter(adapter_id)

    async def run_weight_op(self, subject: str, weight_op: WeightOp) -> WeightOp:
        """Run a weight operation between ops, at a version boundary; returns it with every stage's result.

        Raises LemixError CONFLICT when one of that name is under way.
        """
        if subject in self._weight_ops:
            raise LemixError(ErrorCode.CONFLICT, f"{subject} is under way already")
        future: asyncio.Future[WeightOp] = asyncio.get_running_loop().create_future()
        self._weight_ops[subject] = (weight_op, future)
        self._feed(SyncRequested(subject, weight_op.changes_weights, weight_op.settles))
        return await future

    @contextlib.asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """The stages for oneself; events that come meanwhile wait. Raises LemixError CONFLICT when there is work."""
        if self._held is not None or not self._is_idle():
            raise LemixError(ErrorCode.CONFLICT, "the node has work")
        self._held = []
        try:
            yield
        finally:
            held, self._held = self._held, None
            for event in held:
                self._step(event)
            self._change_order_when_idle()

    def set_queue_order(self, order: QueueOrder) -> None:
        """Use this order of the stage queues, from the moment the node is idle."""
        self._queue_order = order if order is not self._core.config.queue_order else None
        self._change_order_when_idle()

    @property
    def accepts_work(self) -> bool:
        """False while the node drains to change its queue order."""
        return self._queue_order is None

    def _is_idle(self) -> bool:
        state = self._core.snapshot()
        return not self._tasks and not self._weight_ops and not any(state.running_ops)

    def _change_order_when_idle(self) -> None:
        if self._queue_order is None or self._held is not None or not self._is_idle():
            return
        self._core = self._core.with_queue_order(self._queue_order)
        _log.info("queue order", order=str(self._queue_order))
        self._queue_order = None

    # ------------------------------------------------------------- events and commands

    def _feed(self, event: Event) -> None:
        if self._held is not None:
            self._held.append(event)
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
        self._set_timer()
        if self._queue_order is not None:
            self._change_order_when_idle()

    def _perform(self, command: Command) -> None:
        match command:
            case RunOp(stage, op):
                self._run(stage, op)
            case FreeKv(task_id):
                task = self._tasks.get(task_id)
                if isinstance(task, MicrobatchTask):
                    self._payloads.drop(task_id)
                elif task is not None:
                    task.kv_freed = True
                self._kept_versions.pop(task_id, None)
                for runner in self._runners:
                    runner.forget(task_id)
            case TaskDone():
                self._end(command)

    def _run(self, stage: int, op: Op) -> None:
        if op.kind is OpKind.WEIGHT_SYNC:
            weight_op = self._weight_ops[op.subject][0]
            weight_op.version = op.version
            payload = weight_op.payload(op)
        elif op.kind in MOVES:
            payload = (Offload if op.kind is OpKind.OFFLOAD else Reload)(op.op_id, op.task_ids)
        else:
            payload = self._payloads.build(op, stage)
        self._runners[stage].submit(payload, lambda result: self._op_ended(stage, op, result))
        if stage == 0 and op.batch:
            metrics.batch_size(op.kind).observe(op.batch)

    def _set_timer(self) -> None:
        wakeup_s = self._core.next_wakeup_s
        if wakeup_s == self._wakeup_s:
            return
        self._wakeup_s = wakeup_s
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if wakeup_s is not None:
            delay_s = max(0.0, wakeup_s - self._clock.monotonic_s())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._tick)

    def _tick(self) -> None:
        self._wakeup_s = None
        self._feed(Tick())

    # ------------------------------------------------------------- results

    def _op_ended(self, stage: int, op: Op, result: StageResult) -> None:
        """Take over what an op produced, then tell the core, whose next ops build on it."""
        is_last = stage == self.num_stages - 1
        if op.changes_weights and result.version != op.version + 1:
            raise NodeBroken(f"stage {stage} is at version {result.version} after an op that leads to {op.version + 1}")
        error = result.error or _unusable(op, result)
        stopped: list[str] = []
        if error:
            self._note_failure(stage, op, error)
        elif is_last and op.kind in (OpKind.PREFILL, OpKind.DECODE):
            stopped = self._take_tokens(op, result)
        elif is_last and op.kind is OpKind.TRAIN_FORWARD:
            self._take_loss(op, result)
        if op.kind is OpKind.WEIGHT_SYNC:
            self._weight_op_ended(stage, op, result)
        elif op.kind not in MOVES:
            self._payloads.ended(op, stage, result)
            if op.kind is OpKind.OPTIMIZER_STEP:
                self._check_step(stage, op, error)
            if is_last and op.changes_weights:
                self._stepped(op, bool(error))
        self._step(OpDone(stage, op.op_id, tuple(stopped), bool(error)))
        # The next ops are on their way by now: nobody waits for what follows.
        self._count(stage, op, result, bool(error))
        isolated = self.adapters.is_isolated(op.subject)
        self._listener.on_trace(trace_to_proto(op, stage, result, is_last=is_last, isolated=isolated))

    def _stepped(self, op: Op, failed: bool) -> None:
        """An optimizer step left the last stage. That of an isolated adapter makes the served model no newer."""
        now_unix_s = self._clock.unix_s()
        if not failed:
            self.adapters.stepped(op.subject, now_unix_s)
        self._free_adapters()
        if failed or self.adapters.is_isolated(op.subject):
            self.ages.record(op.version + 1, self.ages.at(op.version))
        else:
            self.ages.record(op.version + 1, now_unix_s, op.subject)

    def _take_tokens(self, op: Op, result: StageResult) -> list[str]:
        """Append the new tokens to their requests; returns those that ended the output."""
        now_s = self._clock.monotonic_s()
        for task_id, loss in result.reference_losses:
            self._request(task_id).reference_loss = loss
        for task_id in op.first_ids + op.partial_ids:
            self._request(task_id).kv_freed = False
        for task_id, earlier_id in zip(op.first_ids + op.partial_ids, op.continued, strict=False):
            self._request(task_id).weight_versions += self._kept_versions.pop(earlier_id, [])
        for task_id in op.partial_ids:
            # The first token will stem from the keys and values of this piece too.
            self._note_version(self._request(task_id), op.version)
        stopped = []
        for token in result.tokens:
            task = self._request(token.request_id)
            if task.first_token_s is None:
                task.first_token_s = now_s
                trained_unix_s = self.adapters.newest_step(task.adapter_id, self.ages.at(op.version))
                if trained_unix_s is not None:
                    task.staleness_s = max(0.0, self._clock.unix_s() - trained_unix_s)
            task.generated_ids.append(token.token_id)
            self._note_version(task, op.version)
            logprobs = () if token.logprobs is None else (logprobs_to_proto(token.logprobs),)
            task.logprobs += logprobs
            self._listener.on_tokens(token.request_id, (token.token_id,), logprobs)
            if token.is_end or task.completes_stop(token.token_id):
                stopped.append(token.request_id)
        return stopped

    def _note_version(self, task: RequestTask, step: int) -> None:
        if not task.weight_versions or task.weight_versions[-1].step != step:
            version = types_pb2.WeightVersion(
                node_id=self.node_id,
                incarnation=self._incarnation,
                step=step,
                job_id=task.adapter_id or self.ages.job_of(step),
            )
            task.weight_versions.append(version)

    def _take_loss(self, op: Op, result: StageResult) -> None:
        task = self._tasks[op.task_ids[0]]
        if isinstance(task, MicrobatchTask) and task.adapter is not None:
            self.adapters.made(task.adapter)
        if isinstance(task, MicrobatchTask) and result.loss is not None:
            task.loss, task.label_tokens = result.loss, result.label_tokens
            metrics.TRAINING_LOSS.labels(self.node_id).set(result.loss)

    def _check_step(self, stage: int, op: Op, error: str) -> None:
        """A step changes the weights of all stages or of none. It has what it needs before it starts, so one that fails
        where others did not is never expected; if it happens, the weights belong to no version."""
        is_last = stage == self.num_stages - 1
        changed = self._steps.pop(op.op_id, not error) if is_last else self._steps.setdefault(op.op_id, not error)
        if changed == bool(error):
            raise NodeBroken(f"optimizer step {op.version + 1} changed the weights of some stages only: {error}")

    def _note_failure(self, stage: int, op: Op, error: str) -> None:
        _log.error("op failed", op=str(op.kind), stage=stage, tasks=op.task_ids[:8], subject=op.subject, error=error)
        kind = error.partition(":")[0]
        out_of_memory = kind in ("MemoryError", "OutOfMemoryError")
        code = ErrorCode.RESOURCE_EXHAUSTED if out_of_memory else ErrorCode.INTERNAL
        for task_id in () if op.kind in MOVES else op.task_ids:
            task = self._tasks[task_id]
            if task.error is not None:
                continue  # of a step that fails on one stage and is skipped on the next ones the first is the cause
            if isinstance(task, MicrobatchTask):
                task.skipped = kind == "ArithmeticError"
            task.error = LemixError(code, f"{op.kind} failed on stage {stage}: {public_error(error)}")

    def _weight_op_ended(self, stage: int, op: Op, result: StageResult) -> None:
        weight_op, future = self._weight_ops[op.subject]
        weight_op.results.append(result)
        is_last = stage == self.num_stages - 1
        if not is_last and (op.changes_weights or not result.error):
            return
        del self._weight_ops[op.subject]
        if op.changes_weights:
            failed = [item for item in weight_op.results if item.error]
            if failed and len(failed) < self.num_stages:
                raise NodeBroken(f"{op.subject} changed the weights of some stages only: {failed[0].error}")
            before = self.ages.at(op.version)
            self.ages.record(op.version + 1, before if failed else weight_op.trained(before))
        if not future.done():
            future.set_result(weight_op)

    def _end(self, done: TaskDone) -> None:
        task = self._tasks.pop(done.task_id)
        if done.detail:
            task.error = LemixError(ErrorCode.RESOURCE_EXHAUSTED, done.detail)
        if isinstance(task, RequestTask) and task.weight_versions and not task.kv_freed:
            self._kept_versions[task.task_id] = task.weight_versions
        kind = "inference" if isinstance(task, RequestTask) else "training"
        metrics.TASKS.labels(kind, done.reason).inc()
        now_s = self._clock.monotonic_s()
        self._listener.on_outcome(outcome_to_proto(task, done.reason, node_id=self.node_id, now_s=now_s))
        if isinstance(task, MicrobatchTask):
            for job_id in self._payloads.jobs_to_forget(task):
                _log.info("optimizer state dropped", job=job_id, complete=job_id == task.job_id and task.last)
                for runner in self._runners:
                    runner.forget(job_id)
        self._free_adapters()

    def _request(self, task_id: str) -> RequestTask:
        task = self._tasks[task_id]
        if not isinstance(task, RequestTask):
            raise TypeError(f"{task_id} is not an inference request")
        return task

    def _count(self, stage: int, op: Op, result: StageResult, failed: bool) -> None:
        metrics.ops(stage, op.kind, "error" if failed else "ok").inc()
        metrics.op_seconds(stage, op.kind).inc(result.end_s - result.begin_s)
        if stage == 0 and not failed:
            metrics.tokens(op.kind).inc(op.num_tokens)


def _unusable(op: Op, result: StageResult) -> str:
    """Why a result must not be used although the op did not raise; empty when it may."""
    if op.kind is OpKind.TRAIN_FORWARD and result.loss is not None and not math.isfinite(result.loss):
        return f"ArithmeticError: the loss is {result.loss}"
    return ""
