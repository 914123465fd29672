"""Kinds of operation a stage runs."""

from enum import StrEnum


class OpKind(StrEnum):
    """Kinds of operation a stage runs, one at a time."""

    PREFILL = "prefill"
    DECODE = "decode"
    TRAIN_FORWARD = "train_forward"
    TRAIN_BACKWARD = "train_backward"
    OPTIMIZER_STEP = "optimizer_step"
    WEIGHT_SYNC = "weight_sync"
    #: KV caches or activations go to host memory, or come back. Their time is bytes / bandwidth, no latency model.
    OFFLOAD = "offload"
    RELOAD = "reload"


#: Kinds that no latency model is fitted for.
MOVES = frozenset((OpKind.OFFLOAD, OpKind.RELOAD))
