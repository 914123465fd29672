"""Queue-level hold-back (paper Eq. 4, LeMix's form): what one more training operation would break."""

import math
from heapq import nsmallest

from services.latency import OpKind
from services.scheduler.core.state import Cluster, NodeState

#: An operation shorter than this share of the promised time to first token is within the noise of the prediction.
_SHORT = 0.1
#: Requests that come further apart than this many operations seldom meet one (less than one in five, if they come at
#: random).
_LIKELY = 5.0
#: Requests looked at, the most urgent first: later ones have time.
_MOST_URGENT = 16


def overrun_s(now_s: float, op_s: float, node: NodeState, cluster: Cluster) -> float:
    """Largest overrun that a training operation of `op_s` causes to requests that wait on a node or are expected there.

    0 when it causes none: a request that breaks its promise either way is no reason to hold training back.
    """
    promised_s = cluster.config.default_slo.ttft_s
    if promised_s is not None and op_s < _SHORT * promised_s:
        return 0.0
    worst_s = 0.0
    if node.num_prefilling:
        waiting = (live for live in node.inference.values() if not live.has_first_token)
        at_s = now_s
        for live in nsmallest(_MOST_URGENT, waiting, key=lambda live: live.deadline_s):
            at_s += live.prefill_s / node.costs.num_stages
            if at_s <= live.deadline_s:
                worst_s = max(worst_s, at_s + op_s - live.deadline_s)
    if promised_s is not None and _expects_inference(now_s, op_s, node, cluster):
        own_s = node.costs.node_s(OpKind.PREFILL, 1, cluster.prompts.mean)
        if own_s <= promised_s:
            worst_s = max(worst_s, op_s + own_s - promised_s)
    return worst_s if worst_s < math.inf else 0.0


def _expects_inference(now_s: float, op_s: float, node: NodeState, cluster: Cluster) -> bool:
    """Whether one is likely to arrive while the operation runs, and this is a node it may go to."""
    if cluster.arrivals.gap_s(now_s) > _LIKELY * op_s:
        return False
    return bool(node.inference) or node is cluster.serving[0]
