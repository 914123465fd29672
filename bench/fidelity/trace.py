"""The steps of a scheduler core as records: what arrived, where it went, what was predicted, what happened. Pure.

A live cluster's event log and a simulation bring the same steps, so that one definition measures both. Times are
seconds on the scheduler's clock; those of a simulation begin at 0.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from services.latency import OpKind
from services.scheduler.core.commands import Assign, Command, Reject
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import Event, NodeJoined, NodeLost, OpFinished, TaskArrived, TaskEnded
from services.scheduler.core.node_spec import NodeSpec
from services.scheduler.core.tasks import InferenceTask, TrainingTask

Step = tuple[float, Event, Sequence[Command]]


@dataclass(slots=True)
class RequestTrace:
    """One request. arrived_s: when the scheduler heard of it; it arrived at the gateway at `task.arrival_s`.

    predicted_s: its time to first token as predicted when it was placed. told_end_s: when the scheduler heard that it
    had ended. Times None: it never came so far.
    """

    task: InferenceTask
    arrived_s: float
    node_id: str = ""
    assigned_s: float | None = None
    predicted_s: float | None = None
    first_begin_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    told_end_s: float | None = None
    output_tokens: int = 0
    ok: bool = False

    @property
    def ttft_s(self) -> float:
        """From its arrival at the gateway to its first token on the node; infinite: none, or it did not end well."""
        if not self.ok or self.first_token_s is None:
            return math.inf
        return self.first_token_s - self.task.arrival_s

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first; 0 for one token, infinite without an answer to the end."""
        if not self.ok or self.first_token_s is None or self.last_token_s is None:
            return math.inf
        return (self.last_token_s - self.first_token_s) / max(1, self.output_tokens - 1)


@dataclass(slots=True)
class Trace:
    """One run of a scheduler."""

    config: CoreConfig
    nodes: dict[str, NodeSpec] = field(default_factory=dict)
    joined_s: dict[str, float] = field(default_factory=dict)
    requests: dict[str, RequestTrace] = field(default_factory=dict)
    #: Micro-batches in the order they were offered, each once, and when.
    training: dict[str, TrainingTask] = field(default_factory=dict)
    offered_s: dict[str, float] = field(default_factory=dict)
    ops: list[OpFinished] = field(default_factory=list)
    #: When the scheduler heard of each of `ops`.
    told_s: list[float] = field(default_factory=list)
    #: (time, node, task) of every assignment.
    assignments: list[tuple[float, str, str]] = field(default_factory=list)
    #: (time, node) of every node that was lost.
    lost: list[tuple[float, str]] = field(default_factory=list)

    @property
    def began_s(self) -> float:
        """When the first node joined."""
        return min(self.joined_s.values(), default=0.0)

    def lost_before(self, end_s: float) -> list[str]:
        """Nodes that were lost before a time: after a run its cluster is stopped."""
        return [node_id for at_s, node_id in self.lost if at_s < end_s]


def trace_of(config: CoreConfig, steps: Iterable[Step]) -> Trace:
    """Put the steps of one run together."""
    trace = Trace(config)
    for now_s, event, commands in steps:
        _take(trace, now_s, event)
        for command in commands:
            if isinstance(command, Assign):
                _assigned(trace, now_s, command)
            elif isinstance(command, Reject):
                trace.offered_s.pop(command.task_id, None)
    return trace


def _take(trace: Trace, now_s: float, event: Event) -> None:
    match event:
        case OpFinished():
            trace.ops.append(event)
            trace.told_s.append(now_s)
            _progress(trace, event)
        case TaskArrived(task):
            if isinstance(task, InferenceTask):
                trace.requests.setdefault(task.task_id, RequestTrace(task, now_s))
            else:
                trace.training.setdefault(task.task_id, task)
                trace.offered_s[task.task_id] = now_s
        case TaskEnded():
            request = trace.requests.get(event.task_id)
            if request is not None:
                request.ok, request.output_tokens, request.told_end_s = event.ok, event.output_tokens, now_s
        case NodeJoined(spec):
            trace.nodes[spec.node_id] = spec
            trace.joined_s.setdefault(spec.node_id, now_s)
        case NodeLost(node_id):
            trace.lost.append((now_s, node_id))
        case _:
            pass


def _assigned(trace: Trace, now_s: float, command: Assign) -> None:
    trace.assignments.append((now_s, command.node_id, command.task_id))
    request = trace.requests.get(command.task_id)
    if request is None:
        return
    request.node_id, request.assigned_s = command.node_id, now_s
    for terms in command.terms:
        if terms.node_id == command.node_id and terms.response_s > 0.0:
            request.predicted_s = terms.response_s


def _progress(trace: Trace, op: OpFinished) -> None:
    """Tokens that a stage's operation brought its requests."""
    if op.op not in (OpKind.PREFILL, OpKind.DECODE):
        return
    is_top = op.stage == trace.nodes[op.node_id].num_stages - 1
    num_firsts = len(op.task_ids) - op.partials - op.decodes if op.op is OpKind.PREFILL else 0
    for index, task_id in enumerate(op.task_ids):
        request = trace.requests.get(task_id)
        if request is None:
            continue
        if request.first_begin_s is None:
            request.first_begin_s = op.begin_s
        if is_top and index < num_firsts and op.first_token and request.first_token_s is None:
            request.first_token_s = op.end_s
        if is_top and request.first_token_s is not None:
            request.last_token_s = op.end_s
