"""Takes what ops produced over into their tasks: tokens, losses, failures."""

import math

import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.v1 import types_pb2
from services.latency import MOVES, OpKind
from services.node_agent import metrics
from services.node_agent.adapters import NodeAdapters
from services.node_agent.convert import logprobs_to_proto, public_error
from services.node_agent.core.types import Op
from services.node_agent.engine.base import StageResult
from services.node_agent.loop_ports import Listener
from services.node_agent.tasks import MicrobatchTask, RequestTask, Task
from services.node_agent.weight_ages import WeightAges
from services.runtime.clock import Clock

_log = structlog.get_logger()


class OpResults:
    """Results of one node's ops. `tasks` are its live ones."""

    def __init__(
        self,
        *,
        node_id: str,
        incarnation: int,
        tasks: dict[str, Task],
        adapters: NodeAdapters,
        ages: WeightAges,
        clock: Clock,
        listener: Listener,
    ) -> None:
        self._node_id = node_id
        self._incarnation = incarnation
        self._tasks = tasks
        self._adapters = adapters
        self._ages = ages
        self._clock = clock
        self._listener = listener
        # Of the KV caches kept for sessions, by the request that left them: the weights they stem from.
        self._kept_versions: dict[str, list[types_pb2.WeightVersion]] = {}

    def take(self, op: Op, result: StageResult) -> tuple[str, ...]:
        """Take over what an op left on the last stage; returns the requests whose output it ended."""
        if op.kind in (OpKind.PREFILL, OpKind.DECODE):
            return tuple(self._take_tokens(op, result))
        if op.kind is OpKind.TRAIN_FORWARD:
            self._take_loss(op, result)
        return ()

    def note_failure(self, stage: int, op: Op, error: str) -> None:
        """The tasks of a failed op end with its error."""
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

    def cache_freed(self, task_id: str) -> None:
        """The KV cache of a request, which may have ended, is gone."""
        task = self._tasks.get(task_id)
        if isinstance(task, RequestTask):
            task.kv_freed = True
        self._kept_versions.pop(task_id, None)

    def request_ended(self, task: RequestTask) -> None:
        """A cache that was not freed serves the session's next turn."""
        if task.weight_versions and not task.kv_freed:
            self._kept_versions[task.task_id] = task.weight_versions

    # ------------------------------------------------------------- internals

    def _take_tokens(self, op: Op, result: StageResult) -> list[str]:
        now_s = self._clock.monotonic_s()
        for task_id, loss in result.reference_losses:
            self._request(task_id).reference_loss = loss
        for task_id in op.first_ids + op.partial_ids:
            self._request(task_id).kv_freed = False
        for task_id, earlier_id in zip(op.first_ids + op.partial_ids, op.continued, strict=False):
            self._request(task_id).weight_versions += self._kept_versions.pop(earlier_id, [])
        for task_id, first_id in zip(op.first_ids + op.partial_ids, op.shares, strict=False):
            if first_id:
                self._request(task_id).weight_versions += self._request(first_id).weight_versions
        for task_id in op.partial_ids:
            # The first token will stem from the keys and values of this piece too.
            self._note_version(self._request(task_id), op.version)
        stopped = []
        for token in result.tokens:
            task = self._request(token.request_id)
            if task.first_token_s is None:
                self._first_token(task, now_s, op.version)
            task.generated_ids.append(token.token_id)
            self._note_version(task, op.version)
            logprobs = () if token.logprobs is None else (logprobs_to_proto(token.logprobs),)
            task.logprobs += logprobs
            self._listener.on_tokens(token.request_id, (token.token_id,), logprobs)
            if token.is_end or task.completes_stop(token.token_id):
                stopped.append(token.request_id)
        return stopped

    def _first_token(self, task: RequestTask, now_s: float, step: int) -> None:
        task.first_token_s = now_s
        trained_unix_s = self._adapters.newest_step(task.adapter_id, self._ages.at(step))
        if trained_unix_s is not None:
            task.staleness_s = max(0.0, self._clock.unix_s() - trained_unix_s)

    def _note_version(self, task: RequestTask, step: int) -> None:
        if not task.weight_versions or task.weight_versions[-1].step != step:
            version = types_pb2.WeightVersion(
                node_id=self._node_id,
                incarnation=self._incarnation,
                step=step,
                job_id=task.adapter_id or self._ages.job_of(step),
            )
            task.weight_versions.append(version)

    def _take_loss(self, op: Op, result: StageResult) -> None:
        task = self._tasks[op.task_ids[0]]
        if isinstance(task, MicrobatchTask) and task.adapter is not None:
            self._adapters.made(task.adapter)
        if isinstance(task, MicrobatchTask) and result.loss is not None:
            task.loss, task.label_tokens = result.loss, result.label_tokens
            metrics.TRAINING_LOSS.labels(self._node_id).set(result.loss)

    def _request(self, task_id: str) -> RequestTask:
        task = self._tasks[task_id]
        if not isinstance(task, RequestTask):
            raise TypeError(f"{task_id} is not an inference request")
        return task


def unusable(op: Op, result: StageResult) -> str:
    """Why a result must not be used although the op did not raise; empty when it may."""
    if op.kind is OpKind.TRAIN_FORWARD and result.loss is not None and not math.isfinite(result.loss):
        return f"ArithmeticError: the loss is {result.loss}"
    return ""


def count(stage: int, op: Op, result: StageResult, *, failed: bool) -> None:
    """Count an op that ended."""
    metrics.OPS.labels(stage, op.kind, "error" if failed else "ok").add()
    metrics.OP_SECONDS.labels(stage, op.kind).add(result.end_s - result.begin_s)
    if stage == 0 and not failed:
        metrics.TOKENS.labels(op.kind).add(op.num_tokens)
