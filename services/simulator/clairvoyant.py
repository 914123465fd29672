"""The least held node time that any policy could reach on an input: what `efficiency` is measured against.

A lower bound, for policies that finish every task and keep no request waiting while a node could take it (the scheduler
core asks a policy where a request goes, never whether). Training may be held back for as long as a policy likes. `hold`
is the time a node stays held after its last task. Two facts hold, whoever places the tasks:

* **Work.** A stage runs one operation at a time, and only while a task of its node is unfinished. So a node is held at
  least for the work on its fullest stage, plus one `hold`; the sum over the nodes is at least the work of all tasks on
  the fullest stage, plus one `hold`. A single node comes closest: nothing proves that a second one is needed, because
  no promise is assumed to be kept.
* **Span.** A request is taken when it arrives, or every node is full at that time. Either way some node is held from
  its arrival until it has been served and the `hold` after it is over. Over all requests that is the union of those
  intervals; what of a gap is longer than a `hold` does not count.

Both together, for any time t: the span of the requests before t, cut off at t, plus the work of the tasks that arrive
at t or later. The bound is the largest of these over all arrivals t. On a single node it is Lindley's recursion for the
end of the last task.

It does not hold with noise in the durations, with nodes that come late or get lost, or for tasks left unfinished.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from services.latency import OpKind
from services.scheduler.core.costs import NodeCosts
from services.simulator.types import Microbatch, Request, VirtualNode, Work


@dataclass(frozen=True, slots=True)
class Demand:
    """What one task takes at least: `stage_s` seconds of work on every stage, one stage after the other."""

    arrival_s: float
    stage_s: tuple[float, ...]
    is_request: bool


def demands(work: Sequence[Work], nodes: Sequence[VirtualNode]) -> list[Demand]:
    """Every task on whichever node is fastest, stage by stage.

    Raises ValueError when the bound would not hold: no nodes, nodes that come or go or differ in stages, or batches:
    what an operation for several requests costs is no sum over them.
    """
    _check(nodes)
    costs = [NodeCosts(node.latency) for node in nodes]
    steps: dict[str, int] = {}
    for task in work:
        if isinstance(task, Microbatch):
            steps[task.job_id] = max(steps.get(task.job_id, 1), task.accumulation)
    stages = range(nodes[0].core.num_stages)
    return [
        Demand(
            task.arrival_s,
            tuple(min(_stage_s(task, stage, cost, steps) for cost in costs) for stage in stages),
            isinstance(task, Request),
        )
        for task in work
    ]


def clairvoyant_node_s(tasks: Sequence[Demand], hold_s: float) -> float:
    """The bound, node-seconds; 0 without tasks."""
    ordered = sorted(tasks, key=lambda task: task.arrival_s)
    left_s = _work_from(ordered)
    covered_s, until_s = 0.0, -math.inf
    bound_s = 0.0
    for task, work_s in zip(ordered, left_s, strict=True):
        at_s = task.arrival_s
        bound_s = max(bound_s, covered_s - max(0.0, until_s - at_s) + work_s + hold_s)
        end_s = at_s + sum(task.stage_s) + hold_s
        if task.is_request and end_s > until_s:
            covered_s += end_s - max(at_s, until_s)
            until_s = end_s
    return max(bound_s, covered_s)


def _work_from(ordered: Sequence[Demand]) -> list[float]:
    """For every position the work of it and all later tasks on their fullest stage, seconds."""
    if not ordered:
        return []
    sums = [0.0] * len(ordered[0].stage_s)
    result = []
    for task in reversed(ordered):
        sums = [total + part for total, part in zip(sums, task.stage_s, strict=True)]
        result.append(max(sums))
    result.reverse()
    return result


def _stage_s(task: Work, stage: int, costs: NodeCosts, steps: dict[str, int]) -> float:
    """Work of a task on a stage. An optimizer step is shared by the micro-batches of its group."""
    if isinstance(task, Microbatch):
        step_s = costs.stage_s(stage, OpKind.OPTIMIZER_STEP, 1, 1) / steps[task.job_id]
        kinds = (OpKind.TRAIN_FORWARD, OpKind.TRAIN_BACKWARD)
        return step_s + sum(costs.stage_s(stage, kind, task.batch, task.length) for kind in kinds)
    contexts = range(task.prompt_tokens + 1, task.prompt_tokens + task.output_tokens)
    decode_s = sum(costs.stage_s(stage, OpKind.DECODE, 1, context) for context in contexts)
    return costs.stage_s(stage, OpKind.PREFILL, 1, task.prompt_tokens) + decode_s


def _check(nodes: Sequence[VirtualNode]) -> None:
    if not nodes:
        raise ValueError("the bound needs at least one node")
    for node in nodes:
        if node.core.num_stages != nodes[0].core.num_stages:
            raise ValueError(f"node {node.node_id} differs from the others in its number of stages")
        if node.joins_s > 0.0 or node.lost_s < math.inf:
            raise ValueError(f"node {node.node_id} is not there the whole time")
        if node.core.max_batch != 1:
            raise ValueError(f"node {node.node_id} batches requests (max_batch {node.core.max_batch})")
