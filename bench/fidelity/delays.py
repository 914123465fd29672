"""What the control plane of a live run took, measured in the run: settings of its simulation. Pure."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from bench.fidelity.trace import Trace
from services.latency import OpKind
from services.scheduler.core.events import OpFinished

_INFERENCE = (OpKind.PREFILL, OpKind.DECODE)
_Stage = tuple[str, int]


class Delays(NamedTuple):
    """Medians, seconds. dispatch_s: from a decision until the request's prefill could begin on an idle stage.
    handover_s: from the moment a stage could begin an operation until it began. report_s: from the end of an operation
    until the scheduler knew of it. outcome_s: from the end of a request's last operation until the scheduler knew that
    it had ended, and of all operations before."""

    dispatch_s: float
    handover_s: float
    report_s: float
    outcome_s: float


def measure(trace: Trace, start_s: float) -> Delays:
    """Of what happened since `start_s`."""
    by_stage: defaultdict[_Stage, list[OpFinished]] = defaultdict(list)
    for op in trace.ops:
        by_stage[op.node_id, op.stage].append(op)
    for ops in by_stage.values():
        ops.sort(key=lambda op: op.begin_s)
    handover_s = _median(_handovers(trace, by_stage, start_s))
    report_s = _median(
        [told_s - op.end_s for op, told_s in zip(trace.ops, trace.told_s, strict=True) if op.end_s >= start_s]
    )
    dispatch_s = _median(_dispatches(trace, by_stage, start_s))
    outcome_s = _median(
        [
            request.told_end_s - request.last_token_s
            for request in trace.requests.values()
            if request.ok and request.told_end_s is not None and request.last_token_s is not None
            if request.last_token_s >= start_s
        ]
    )
    return Delays(max(0.0, dispatch_s - handover_s), max(0.0, handover_s), max(0.0, report_s), max(0.0, outcome_s))


def _handovers(trace: Trace, by_stage: dict[_Stage, list[OpFinished]], start_s: float) -> list[float]:
    """Of decode iterations: their requests' last operation is over, and so is the one before on the stage."""
    #: When the newest operation on a request ended.
    ends_s: dict[str, float] = {}
    stage_ends_s: dict[_Stage, float] = {}
    found = []
    for op in sorted((op for ops in by_stage.values() for op in ops), key=lambda op: op.begin_s):
        place = op.node_id, op.stage
        known = [ends_s[task_id] for task_id in op.task_ids if task_id in ends_s]
        if op.op is OpKind.DECODE and len(known) == len(op.task_ids) and place in stage_ends_s and op.begin_s > start_s:
            ready_s = max(*known, stage_ends_s[place])
            found.append(op.begin_s - ready_s)
        stage_ends_s[place] = op.end_s
        if op.op in _INFERENCE:
            ends_s.update(dict.fromkeys(op.task_ids, op.end_s))
    return found


def _dispatches(trace: Trace, by_stage: dict[_Stage, list[OpFinished]], start_s: float) -> list[float]:
    """Of requests that found the first stage idle."""
    found = []
    for request in trace.requests.values():
        given_s, begin_s = request.assigned_s, request.first_begin_s
        if given_s is None or begin_s is None or given_s < start_s:
            continue
        before = [op for op in by_stage[request.node_id, 0] if op.begin_s < begin_s]
        if not before or max(op.end_s for op in before[-4:]) <= given_s:
            found.append(begin_s - given_s)
    return found


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0
