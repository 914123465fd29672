"""What the profile and the calibrated scheduler predicted for every operation that ran.

The steps are played into a fresh scheduler core. Before it learns of an operation it is asked what it would have
predicted: that is the calibrated prediction, made with what had been seen until then. Pure.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from bench.live.errors import LiveError
from services.latency import NodeLatency, OpKind
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.costs import NodeCosts
from services.scheduler.core.events import NodeJoined, OpFinished, TaskArrived
from services.scheduler.core.scheduler import SchedulerCore
from services.scheduler.core.tasks import TrainingTask
from services.scheduler.explain.log_file import Step

#: Kind of a prefill that decodes too.
MIXED = "mixed"
_TRAINING = (OpKind.TRAIN_FORWARD, OpKind.TRAIN_BACKWARD)
_WHOLE_MODEL = (OpKind.OPTIMIZER_STEP, OpKind.WEIGHT_SYNC)


class Size(NamedTuple):
    """What an operation worked on: sequences, tokens of each (decode: context), cached ones before them, and the same
    of the requests that decoded in it. A training operation may be one of several parts."""

    batch: int
    length: float
    cached: float = 0.0
    decodes: int = 0
    decode_length: float = 0.0
    parts: int = 1
    job_id: str = ""


class Sample(NamedTuple):
    """One operation that ran. low_s, high_s: the profile's 90 % interval. beside: what ran on the node's other stages
    when it began, of each stage one kind."""

    at_s: float
    node_id: str
    stage: int
    kind: str
    size: Size
    measured_s: float
    profile_s: float
    low_s: float
    high_s: float
    online_s: float
    online_low_s: float
    online_high_s: float
    beside: tuple[str, ...]


def samples(config: CoreConfig, steps: Sequence[Step]) -> list[Sample]:
    """Every operation of a run that the profile has a model for; moves between memories are left out.

    Raises LiveError when the core does not decide as it did: then its predictions are not those of the run.
    """
    core = SchedulerCore(config)
    latencies: dict[str, NodeLatency] = {}
    training: dict[str, TrainingTask] = {}
    beside = _Beside(step.event for step in steps if isinstance(step.event, OpFinished))
    found = []
    for step in steps:
        match step.event:
            case NodeJoined(spec):
                latencies[spec.node_id] = spec.latency
            case TaskArrived(TrainingTask() as task):
                training[task.task_id] = task
            case OpFinished() as op if op.node_id in latencies:
                size = size_of(op, training)
                costs = core.costs(op.node_id)
                if size is not None and costs is not None:
                    found.append(_sample(op, size, latencies[op.node_id], costs, beside.kinds(op)))
            case _:
                pass
        if core.step(step.now_s, step.event) != step.commands:
            raise LiveError(f"line {step.line} of the event log: a replay does not decide as it was decided")
    return [sample for sample in found if sample.profile_s > 0.0]


def size_of(op: OpFinished, training: Mapping[str, TrainingTask]) -> Size | None:
    """What an operation worked on; None when that is not known or no model is about it."""
    if op.op in _WHOLE_MODEL:
        return Size(1, 1.0, job_id=op.job_id)
    if op.op in _TRAINING:
        task = training.get(op.task_ids[0]) if op.task_ids else None
        return None if task is None else Size(task.batch, task.length, parts=op.parts, job_id=task.job_id)
    batch = len(op.task_ids) - op.decodes
    if op.op is OpKind.DECODE and batch:
        return Size(batch, op.context_tokens / batch)
    if op.op is OpKind.PREFILL and batch:
        decode_length = op.decode_context_tokens / op.decodes if op.decodes else 0.0
        return Size(batch, op.num_tokens / batch, op.context_tokens / batch, op.decodes, decode_length)
    return None


def _sample(op: OpFinished, size: Size, latency: NodeLatency, costs: NodeCosts, beside: tuple[OpKind, ...]) -> Sample:
    model = latency.models[op.stage].get(op.op)
    alone_s = latency.op_s(op.stage, op.op, size.batch, size.length, size.cached)
    online_s = costs.stage_s(op.stage, op.op, size.batch, size.length, size.cached, size.job_id)
    online_low, online_high = _interval(op, size, costs)
    if size.decodes:
        decode_s = latency.op_s(op.stage, OpKind.DECODE, size.decodes, size.decode_length)
        alone_s = latency.mixed_s(op.stage, alone_s, decode_s)
        online_decode_s = costs.stage_s(op.stage, OpKind.DECODE, size.decodes, size.decode_length)
        online_s = costs.mixed_s(op.stage, online_s, online_decode_s)
    slowdown = max((latency.slowdown(op.stage, op.op, kind) for kind in beside), default=0.0)
    profile_s = alone_s * (1.0 + slowdown) / size.parts
    online_s /= size.parts
    low, high = (model.residual_p5, model.residual_p95) if model is not None else (0.0, 0.0)
    return Sample(
        op.end_s,
        op.node_id,
        op.stage,
        MIXED if size.decodes else op.op.value,
        size,
        op.end_s - op.begin_s,
        profile_s,
        profile_s * (1.0 + low),
        profile_s * (1.0 + high),
        online_s,
        online_s * online_low,
        online_s * online_high,
        tuple(kind.value for kind in beside),
    )


def _interval(op: OpFinished, size: Size, costs: NodeCosts) -> tuple[float, float]:
    """The calibrated 90 % interval in units of the prediction."""
    predicted_s = costs.stage_s(op.stage, op.op, size.batch, size.length, size.cached)
    if predicted_s <= 0.0:
        return 1.0, 1.0
    low_s, high_s = costs.interval_s(op.stage, op.op, size.batch, size.length, size.cached)
    return low_s / predicted_s, high_s / predicted_s


class _Beside:
    """What ran on the other stages of a node at a time."""

    def __init__(self, ops: Iterable[OpFinished]) -> None:
        self._ops: defaultdict[str, defaultdict[int, list[OpFinished]]] = defaultdict(lambda: defaultdict(list))
        for op in ops:
            self._ops[op.node_id][op.stage].append(op)
        for stages in self._ops.values():
            for found in stages.values():
                found.sort(key=lambda op: op.begin_s)

    def kinds(self, op: OpFinished) -> tuple[OpKind, ...]:
        """Of each other stage what it was running when `op` began."""
        running = []
        for stage, ops in self._ops[op.node_id].items():
            index = bisect_right(ops, op.begin_s, key=lambda other: other.begin_s) - 1
            if stage != op.stage and index >= 0 and ops[index].end_s > op.begin_s:
                running.append(ops[index].op)
        return tuple(running)
