"""The ablation "no profile": nothing is known about durations before operations have run."""

from services.latency import LatencyModel, NodeLatency, OpKind
from services.scheduler.core.costs import NodeCosts

#: Any value: only ratios of predictions matter until traces correct it.
_ASSUMED_S = 0.1
_OPS = (OpKind.PREFILL, OpKind.TRAIN_FORWARD, OpKind.TRAIN_BACKWARD)


def no_profile(num_stages: int) -> NodeCosts:
    """Costs under which every task takes the same time on every stage, whatever its length and kind.

    A request is one forward then: the iterations after its first token are not foreseen. Real durations still correct
    the ratio per kind of operation, as with a profile.
    """
    models = {op: LatencyModel("constant", (_ASSUMED_S,)) for op in _OPS}
    return NodeCosts(NodeLatency((models,) * num_stages))
