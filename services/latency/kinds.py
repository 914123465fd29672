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


#: The kinds of work, for what runs with every operation: looking a member up in its class goes through the metaclass
#: and takes ten times as long as a name of the module.
PREFILL = OpKind.PREFILL
DECODE = OpKind.DECODE
TRAIN_FORWARD = OpKind.TRAIN_FORWARD
TRAIN_BACKWARD = OpKind.TRAIN_BACKWARD
OPTIMIZER_STEP = OpKind.OPTIMIZER_STEP
WEIGHT_SYNC = OpKind.WEIGHT_SYNC

#: Kinds that no latency model is fitted for.
MOVES = frozenset((OpKind.OFFLOAD, OpKind.RELOAD))
