"""Predicted response of a request on a node whose runtime batches per iteration and takes inference first.

The paper's per-task path (forecast.py) knows no batching. Here a node is described by what it holds: prompts whose
prefill is to come, requests that decode together, and the training operation that may hold the stage.
"""

import math
from dataclasses import dataclass

from services.latency import DECODE, PREFILL
from services.scheduler.core.state import Cluster, LiveInference, NodeState

#: A request meets a running training operation at any point of it: this share of such requests wait no longer than this
#: share of the operation.
_BLOCKING_QUANTILE = 0.75


@dataclass(frozen=True, slots=True)
class Response:
    """Prediction for one request on one node, seconds. ttft_s counts from the request's arrival.

    place_s: of that the time until there is a place in the batches and room in the KV cache. demoted_s: prefills that
    the node puts off until after this one, because they break their promise anyway; if it does so too, they come first.
    """

    ttft_s: float
    tpot_s: float
    place_s: float = 0.0
    demoted_s: float = 0.0


def predict_response(
    now_s: float, live: LiveInference, node: NodeState, cluster: Cluster, cached_tokens: int = 0
) -> Response:
    """TTFT and TPOT of a request that goes to `node` now, where `cached_tokens` of its prompt need no prefill."""
    task = live.task
    costs = node.costs
    stages = costs.num_stages
    slots = stages * node.spec.max_batch
    num_live = len(node.inference)
    running = min(num_live + 1, slots)
    context = (node.context_tokens + task.prompt_tokens) / (num_live + 1)
    # Each stage works on its own decode batch, so a request meets the running requests of one stage.
    iteration_s = costs.node_s(DECODE, max(1.0, running / stages), context)
    own_s = costs.node_s(PREFILL, 1, task.prompt_tokens - cached_tokens, cached_tokens)
    demoted_s = _demoted_s(node)
    waiting_s = _blocking_s(node, iteration_s) + node.prefilling_s / stages - demoted_s
    num_leaving = _num_leaving(live, node, slots)
    place_s = 0.0
    if num_leaving:
        # Of n running requests one leaves every (output length / n) iterations.
        output_tokens = cluster.outputs.expected_tokens(task)
        place_s = num_leaving * output_tokens * iteration_s / min(num_live, slots)
    # With more than one stage training fills the gaps of each, and an iteration meets it half done.
    training_s = 0.5 * node.training_op_s * stages if stages > 1 else 0.0
    ttft_s = now_s - task.arrival_s + waiting_s + place_s + own_s
    return Response(ttft_s, iteration_s + _prefills_s(now_s, node) + training_s, place_s, demoted_s)


def predict_iteration_s(now_s: float, node: NodeState, context_tokens: float) -> float:
    """What an iteration of the requests on a node takes without training, seconds, the prefills it waits for included.

    They are taken to decode in one batch: those that came apart meet again behind the next prefill. context_tokens: of
    a request, should there be none.
    """
    count = len(node.inference)
    context = node.context_tokens / count if count else context_tokens
    batch = min(max(1, count), node.spec.max_batch)
    return node.costs.node_s(DECODE, batch, context) + _prefills_s(now_s, node)


def _demoted_s(node: NodeState) -> float:
    """Prefills that let the request pass: all that were demoted but for one, which may be running."""
    if not node.num_demoted:
        return 0.0
    return node.demoted_s * (1.0 - 1.0 / node.num_demoted) / node.costs.num_stages


def _prefills_s(now_s: float, node: NodeState) -> float:
    """Time an iteration waits for the prefills of other requests, on all stages together: on each it meets one with the
    probability that the stage is busy with prefills, and then waits for what is left of it (M/G/1 residual work)."""
    prefills = node.prefills
    if not prefills.count:
        return 0.0
    # No stage is busy for more than all of its time.
    gap_s = max(node.arrivals.gap_s(now_s), prefills.mean)
    return node.costs.num_stages * (prefills.mean**2 + prefills.std**2) / (2.0 * gap_s) if gap_s > 0.0 else 0.0


def _num_leaving(live: LiveInference, node: NodeState, slots: int) -> int:
    """How many requests must leave before there is a place in the batches and room in the KV cache for this one."""
    num_live = len(node.inference)
    if not num_live:
        return 0
    needed = node.reserved_tokens + live.task.prompt_tokens + live.task.max_tokens - node.spec.kv_capacity_tokens
    by_room = math.ceil(needed * num_live / node.reserved_tokens) if needed > 0 else 0
    return max(0, num_live - slots + 1, by_room)


def _blocking_s(node: NodeState, iteration_s: float) -> float:
    """Time until the stages take an inference operation: an operation is not interrupted once it runs.

    While requests decode on a single stage there is always inference ready, so training does not get in between; with
    more stages it fills the gaps of each.
    """
    decoding = len(node.inference) > node.num_prefilling
    if decoding and node.costs.num_stages == 1:
        return iteration_s
    blocking_s = _BLOCKING_QUANTILE * node.training_op_s * node.costs.num_stages
    return max(blocking_s, iteration_s) if decoding else blocking_s
