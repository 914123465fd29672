"""Builds what a stage worker runs from what the core decided."""

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import repeat

from services.latency import OpKind
from services.node_agent.core.types import Op
from services.node_agent.engine.base import StageResult
from services.node_agent.engine.handle import Handle
from services.node_agent.engine.inference_ops import Decode, DecodeSequence, Prefill, PrefillSequence
from services.node_agent.engine.ops import StageOp
from services.node_agent.engine.training_ops import OptimizerSpec, OptimizerStep, TrainBackward, TrainForward
from services.node_agent.tasks import MicrobatchTask, RequestTask, Task


@dataclass(slots=True)
class _Travelling:
    """An op between its first and its last stage: what every stage gets, and the newest stage's output."""

    task_ids: tuple[str, ...]
    prompts: tuple[PrefillSequence, ...] = ()
    newest_tokens: tuple[DecodeSequence, ...] = ()
    grad_norm_sq_total: float | None = None
    output: Handle | None = None
    #: What the two ends of a model with tied embeddings send each other: a gradient down, a new embedding up.
    tied: Handle | None = None
    stages_left: int = 0


@dataclass(slots=True)
class _Gradients:
    """What a group of micro-batches has left in the stages' accumulators, until its step left the last stage."""

    job_id: str
    #: Squared norm by stage; None: nothing there.
    norms_sq: list[float | None]


@dataclass(slots=True)
class PayloadBuilder:
    """Payloads of the ops on their way. Its size is bounded by the ops in flight, the groups that wait for their step
    and `max_optimizer_states`.

    A batch is fixed when its op starts on its first stage; every later stage gets the same sequences.
    """

    tasks: dict[str, Task]
    num_stages: int
    #: Jobs whose optimizer state a stage keeps (two more copies of the weights each).
    max_optimizer_states: int
    _optimizers: OrderedDict[str, OptimizerSpec] = field(default_factory=OrderedDict)
    _travelling: dict[int, _Travelling] = field(default_factory=dict)
    # By accumulation group. Their jobs' optimizers are needed.
    _gradients: dict[int, _Gradients] = field(default_factory=dict)

    def build(self, op: Op, stage: int) -> StageOp:
        """The payload of this op for this stage, the next on its way. Weight synchronisations are not built here."""
        state = self._travelling.get(op.op_id)
        if state is None:
            state = self._begin(op)
            self._travelling[op.op_id] = state
        # Of a cut op the first piece takes what the stage before left, and the last one leaves it for the next.
        handle, state.output = state.output, None
        match op.kind:
            case OpKind.PREFILL:
                return Prefill(op.op_id, op.version, state.prompts, handle, state.newest_tokens)
            case OpKind.DECODE:
                return Decode(op.op_id, op.version, state.newest_tokens, handle)
            case OpKind.TRAIN_FORWARD:
                return self._train_forward(op, handle)
            case OpKind.TRAIN_BACKWARD:
                tied = state.tied if stage == 0 and op.part == 0 else None
                return TrainBackward(op.op_id, op.task_ids[0], handle, tied, op.group, op.part)
            case OpKind.OPTIMIZER_STEP:
                return self._optimizer_step(op, stage, state)
            case _:
                raise ValueError(f"{op.kind} has no payload here")

    def ended(self, op: Op, stage: int, result: StageResult) -> None:
        """Take over a result: the output for the next stage, and the norm of the stage's gradient."""
        state = self._travelling.get(op.op_id)
        if op.kind is OpKind.TRAIN_BACKWARD:
            # A failed one is followed by a step as well.
            gradients = self._gradients.setdefault(op.group, _Gradients(op.subject, [None] * self.num_stages))
            if not result.error and op.part + 1 == op.parts:
                gradients.norms_sq[stage] = result.grad_norm_sq
        elif op.kind is OpKind.OPTIMIZER_STEP and stage == self.num_stages - 1:
            self._gradients.pop(op.group, None)
        if state is None:  # its task was dropped while the op ran
            return
        if op.kind is OpKind.OPTIMIZER_STEP:
            state.tied = state.tied or result.output
            if result.error:
                # A stage could not step: those above it must not either.
                state.grad_norm_sq_total = math.nan
        else:
            state.output = result.output
            state.tied = state.tied or result.tied_gradient
        state.stages_left -= op.part + 1 == op.parts
        travels_on = op.changes_weights or not result.error
        if state.stages_left == 0 or not travels_on:
            del self._travelling[op.op_id]

    def drop(self, task_id: str) -> None:
        """A micro-batch left: its ops that wait between stages will not run any more."""
        for op_id in [op_id for op_id, state in self._travelling.items() if state.task_ids == (task_id,)]:
            del self._travelling[op_id]

    def jobs_to_forget(self, ended: MicrobatchTask) -> list[str]:
        """Jobs whose optimizer state goes now that this micro-batch has ended.

        Its own when it was the job's last one; beyond the bound the least recently trained, whose moments and schedule
        start anew if it comes back. Never one with live micro-batches or with gradients that wait for their step.
        """
        live = {task.job_id for task in self.tasks.values() if isinstance(task, MicrobatchTask)}
        live.update(gradients.job_id for gradients in self._gradients.values())
        idle = [job_id for job_id in self._optimizers if job_id not in live]
        jobs = idle[: max(0, len(self._optimizers) - self.max_optimizer_states)]
        if ended.last and ended.job_id in idle and ended.job_id not in jobs:
            jobs.append(ended.job_id)
        for job_id in jobs:
            del self._optimizers[job_id]
        return jobs

    def is_trained(self, job_id: str) -> bool:
        """Whether gradients of this job wait for their step."""
        return any(gradients.job_id == job_id for gradients in self._gradients.values())

    def forget_job(self, job_id: str) -> None:
        """Its optimizer state goes with its adapter."""
        self._optimizers.pop(job_id, None)

    @property
    def optimizers(self) -> Mapping[str, OptimizerSpec]:
        """Jobs whose optimizer state the stages keep."""
        return self._optimizers

    def adopt(self, optimizers: Mapping[str, OptimizerSpec]) -> None:
        """The stages have restored the optimizer state of these jobs. Others that train here begin anew."""
        self._optimizers = OrderedDict({**self._optimizers, **optimizers})

    # ------------------------------------------------------------- internals

    def _begin(self, op: Op) -> _Travelling:
        state = _Travelling(op.task_ids, stages_left=self.num_stages)
        if op.kind is OpKind.PREFILL:
            starts = zip(op.cached_tokens, op.continued, strict=True) if op.cached_tokens else repeat((0, ""))
            pieces = zip(
                op.first_ids + op.partial_ids,
                starts,
                op.end_tokens or repeat(0),
                op.shares or repeat(""),
                strict=False,
            )
            state.prompts = tuple(
                _prefill_sequence(self._request(task_id), *start, end, shares) for task_id, start, end, shares in pieces
            )
            state.newest_tokens = tuple(_decode_sequence(self._request(task_id)) for task_id in op.decode_ids)
        elif op.kind is OpKind.DECODE:
            state.newest_tokens = tuple(_decode_sequence(self._request(task_id)) for task_id in op.task_ids)
        elif op.kind is OpKind.TRAIN_FORWARD:
            # Remembered for the step: its group may consist of cancelled micro-batches by then.
            task = self._microbatch(op.task_ids[0])
            task.fresh_optimizer |= task.job_id not in self._optimizers
            self._optimizers.setdefault(task.job_id, task.optimizer)
            self._optimizers.move_to_end(task.job_id)
        elif op.kind is OpKind.OPTIMIZER_STEP:
            self._begin_step(op, state)
        return state

    def _begin_step(self, op: Op, state: _Travelling) -> None:
        """All stages clip by one norm: the whole model's, summed over the stages' last backwards of the group.

        When some stages hold no gradient, or a part of one (the only micro-batches were dropped on their way down), it
        is NaN: every stage skips the step then, instead of some changing their weights without the others.
        """
        gradients = self._gradients.get(op.group)
        norms = [norm for norm in gradients.norms_sq if norm is not None] if gradients is not None else []
        state.grad_norm_sq_total = sum(norms) if len(norms) == self.num_stages else math.nan
        for task_id in op.task_ids:
            self._microbatch(task_id).weight_step = op.version + 1

    def _train_forward(self, op: Op, handle: Handle | None) -> TrainForward:
        task = self._microbatch(op.task_ids[0])
        return TrainForward(
            op.op_id,
            op.version,
            task.task_id,
            task.examples,
            1.0 / task.accumulation,
            handle,
            op.part,
            op.parts,
            task.job_id,
            self._optimizers[task.job_id] if op.part == 0 else None,
            task.adapter,
        )

    def _optimizer_step(self, op: Op, stage: int, state: _Travelling) -> OptimizerStep:
        return OptimizerStep(
            op.op_id,
            op.version,
            op.subject,
            self._optimizers[op.subject],
            grad_norm_sq_total=state.grad_norm_sq_total,
            tied_weight=state.tied if stage == self.num_stages - 1 else None,
            group=op.group,
            oldest_version=op.oldest_version,
        )

    def _request(self, task_id: str) -> RequestTask:
        task = self.tasks[task_id]
        if not isinstance(task, RequestTask):
            raise TypeError(f"{task_id} is not an inference request")
        return task

    def _microbatch(self, task_id: str) -> MicrobatchTask:
        task = self.tasks[task_id]
        if not isinstance(task, MicrobatchTask):
            raise TypeError(f"{task_id} is not a micro-batch")
        return task


def _prefill_sequence(
    task: RequestTask, cached_tokens: int, continues: str, end_token: int, shares: str
) -> PrefillSequence:
    """With its output so far, if it gave up its cache for others."""
    num_output = len(task.generated_ids)
    return PrefillSequence(
        task.task_id,
        (*task.prompt_ids, *task.generated_ids) if num_output else task.prompt_ids,
        task.sampling,
        task.max_tokens - num_output,
        () if num_output else task.reference_ids,
        cached_tokens,
        continues,
        end_token,
        num_output,
        task.adapter_id,
        shares,
    )


def _decode_sequence(task: RequestTask) -> DecodeSequence:
    position = len(task.prompt_ids) + len(task.generated_ids) - 1
    return DecodeSequence(task.task_id, task.generated_ids[-1], position)
