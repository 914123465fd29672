"""A node that completes work by its latency model: deterministic, small, enough to drive the scheduler core."""

from collections import deque
from dataclasses import dataclass, field

from services.latency import OpKind
from services.scheduler.core.events import Event, OpFinished, TaskEnded
from services.scheduler.core.node_spec import NodeSpec, QueueOrder
from services.scheduler.core.tasks import InferenceTask, Task, TrainingTask

_INFERENCE = (OpKind.PREFILL, OpKind.DECODE)


@dataclass(slots=True, eq=False)
class Op:
    """One operation on its way over the stages."""

    kind: OpKind
    tasks: tuple[Task, ...]
    stage: int
    begin_s: float = 0.0


@dataclass(eq=False)
class FakeNode:
    """Stages that run one op at a time; every running request is decoded in one batch.

    outputs: output length by task id. One optimizer step follows every `accumulation` micro-batches.
    """

    spec: NodeSpec
    order: QueueOrder
    outputs: dict[str, int]
    accumulation: int = 1
    #: Next free place in the pipeline of each stage.
    running: dict[int, Op] = field(default_factory=dict)
    ready: list[Op] = field(default_factory=list)
    produced: dict[str, int] = field(default_factory=dict)
    waiting_decode: dict[str, InferenceTask] = field(default_factory=dict)
    accumulated: list[TrainingTask] = field(default_factory=list)
    cancelled: set[str] = field(default_factory=set)
    steps: int = 0

    def add(self, task: Task) -> None:
        """Take a task."""
        kind = OpKind.PREFILL if isinstance(task, InferenceTask) else OpKind.TRAIN_FORWARD
        self.ready.append(Op(kind, (task,), 0))

    def start_ops(self, now_s: float) -> list[tuple[float, Op]]:
        """Start what may run on idle stages; returns (end, op)."""
        started = []
        for stage in range(self.spec.num_stages):
            if stage in self.running:
                continue
            if stage == 0 and self.waiting_decode and not self._decode_in_flight():
                self.ready.append(Op(OpKind.DECODE, tuple(self.waiting_decode.values()), 0))
                self.waiting_decode = {}
            op = self._next(stage)
            if op is None:
                continue
            self.ready.remove(op)
            op.begin_s = now_s
            self.running[stage] = op
            started.append((now_s + self._duration_s(op), op))
        return started

    def end_op(self, now_s: float, op: Op) -> list[Event]:
        """An op ended on its stage; returns its trace and the tasks that ended with it."""
        del self.running[op.stage]
        top = self.spec.num_stages - 1
        trace = OpFinished(
            self.spec.node_id,
            op.stage,
            op.kind,
            op.begin_s,
            now_s,
            () if op.kind is OpKind.OPTIMIZER_STEP else tuple(task.task_id for task in op.tasks),
            num_tokens=self._num_tokens(op),
            context_tokens=self._context(op) if op.kind is OpKind.DECODE else 0,
            first_token=op.kind is OpKind.PREFILL and op.stage == top,
            weight_step=self.steps,
        )
        backward = op.kind is OpKind.TRAIN_BACKWARD
        if op.stage != (0 if backward else top):
            op.stage += -1 if backward else 1
            self.ready.append(op)
            return [trace]
        return [trace, *self._left(op, top)]

    def cancel(self, task_id: str) -> list[Event]:
        """Drop a task at once if it only waits, else when its op leaves the pipeline."""
        for op in self.ready:
            if op.tasks[0].task_id == task_id and op.kind in (OpKind.PREFILL, OpKind.TRAIN_FORWARD):
                self.ready.remove(op)
                return [TaskEnded(task_id, self.spec.node_id, ok=False)]
        self.cancelled.add(task_id)
        return []

    def _left(self, op: Op, top: int) -> list[Event]:
        """The op left the pipeline."""
        if op.kind in _INFERENCE:
            return [event for task in op.tasks for event in self._token(task)]
        if op.kind is OpKind.TRAIN_FORWARD:
            self.ready.append(Op(OpKind.TRAIN_BACKWARD, op.tasks, top))
            return []
        if op.kind is OpKind.TRAIN_BACKWARD:
            self.accumulated += [task for task in op.tasks if isinstance(task, TrainingTask)]
            if len(self.accumulated) >= self.accumulation:
                self.ready.append(Op(OpKind.OPTIMIZER_STEP, tuple(self.accumulated), 0))
                self.accumulated = []
            return []
        self.steps += 1
        return [TaskEnded(task.task_id, self.spec.node_id, ok=task.task_id not in self.cancelled) for task in op.tasks]

    def _token(self, task: Task) -> list[Event]:
        assert isinstance(task, InferenceTask)
        produced = self.produced[task.task_id] = self.produced.get(task.task_id, 0) + 1
        ended = task.task_id in self.cancelled
        if not ended and produced < min(self.outputs.get(task.task_id, 1), task.max_tokens):
            self.waiting_decode[task.task_id] = task
            return []
        del self.produced[task.task_id]
        return [TaskEnded(task.task_id, self.spec.node_id, ok=not ended, output_tokens=produced)]

    def _decode_in_flight(self) -> bool:
        return any(op.kind is OpKind.DECODE for op in (*self.ready, *self.running.values()))

    def _next(self, stage: int) -> Op | None:
        here = deque(op for op in self.ready if op.stage == stage)
        if not here:
            return None
        if self.order is QueueOrder.INFERENCE_FIRST:
            return next((op for op in here if op.kind in _INFERENCE), here[0])
        return here[0]

    def _num_tokens(self, op: Op) -> int:
        if op.kind is OpKind.DECODE:
            return len(op.tasks)
        return sum(
            task.prompt_tokens if isinstance(task, InferenceTask) else task.batch * task.length for task in op.tasks
        )

    def _context(self, op: Op) -> int:
        return sum(
            task.prompt_tokens + self.produced[task.task_id] for task in op.tasks if isinstance(task, InferenceTask)
        )

    def _duration_s(self, op: Op) -> float:
        latency = self.spec.latency
        first = op.tasks[0]
        if op.kind is OpKind.DECODE:
            return latency.op_s(op.stage, op.kind, len(op.tasks), self._context(op) / len(op.tasks))
        if isinstance(first, TrainingTask):
            return latency.op_s(op.stage, op.kind, first.batch, first.length)
        return latency.op_s(op.stage, op.kind, 1, first.prompt_tokens)
