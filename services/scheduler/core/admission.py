"""What is refused, and when an answer is due."""

import math
from collections.abc import Sequence

from services.scheduler.core.commands import Reject
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.state import NodeState
from services.scheduler.core.tasks import InferenceTask, Task

#: Told to a refused caller; the queue is long by then and needs about that to move.
_RETRY_AFTER_S = 1.0


def deadline_s(task: InferenceTask, config: CoreConfig, ttft_s: float | None = None) -> float:
    """When the first token of a request is due, seconds; infinite without a promise. ttft_s: instead of that."""
    if ttft_s is None:
        ttft_s = task.slo.ttft_s if task.slo.ttft_s is not None else config.default_slo.ttft_s
    return math.inf if ttft_s is None else task.arrival_s + ttft_s


def refuse(task: InferenceTask, serving: Sequence[NodeState]) -> Reject | None:
    """Refuse a request that no serving node could ever run. Without such nodes it waits for the first, and for nodes
    that have not told of their adapters yet."""
    if not serving:
        return None
    if task.adapter_id:
        is_known = all(node.adapter_ids is not None for node in serving)
        serving = [node for node in serving if node.holds(task.adapter_id)]
        if not serving and not is_known:
            return None
        if not serving:
            return Reject(task.task_id, "MODEL_NOT_FOUND", f"no node that serves holds adapter {task.adapter_id}")
    needed = task.prompt_tokens + task.max_tokens
    largest = max(serving, key=lambda node: node.max_request_tokens)
    if needed <= largest.max_request_tokens:
        return None
    numbers = f"prompt ({task.prompt_tokens}) plus max_tokens ({task.max_tokens}) is {needed} tokens"
    context_tokens = max(node.spec.max_context_tokens for node in serving)
    if needed > context_tokens:
        return Reject(task.task_id, "CONTEXT_LENGTH_EXCEEDED", f"{numbers}; the context holds {context_tokens}")
    return Reject(
        task.task_id, "RESOURCE_EXHAUSTED", f"{numbers}; the KV cache of a node holds {largest.max_request_tokens}"
    )


def refuse_stale(now_s: float, task: InferenceTask, serving: Sequence[NodeState]) -> Reject | None:
    """Refuse a request that wants fresher weights than any serving node has. It waits for the first node, and for
    nodes that have not told of their weights yet."""
    wanted_s = task.max_staleness_s
    if wanted_s is None or not serving:
        return None
    if any(node.is_fresh(now_s, wanted_s) or math.isnan(node.trained_s) for node in serving):
        return None
    newest_s = max(node.trained_s for node in serving)
    freshest = f"the freshest are {now_s - newest_s:.1f} s old" if newest_s > -math.inf else "none were ever trained"
    message = f"no node's weights were trained within the last {wanted_s:g} s; {freshest}"
    return Reject(task.task_id, "STALE_WEIGHTS", message, _RETRY_AFTER_S)


def refuse_overloaded(task: Task) -> Reject:
    """Refuse a task because too many wait already."""
    kind = "requests" if isinstance(task, InferenceTask) else "micro-batches"
    return Reject(task.task_id, "OVERLOADED", f"too many {kind} are waiting for a node", _RETRY_AFTER_S)
