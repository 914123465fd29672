"""Nodes as they tell the scheduler core of themselves, and what a policy lets them do."""

from dataclasses import dataclass
from enum import StrEnum

from services.latency import NodeLatency


class NodeRole(StrEnum):
    """What a policy lets a node do."""

    SERVE = "serve"
    TRAIN = "train"
    BOTH = "both"
    #: Gets no work.
    UNUSED = "unused"


class QueueOrder(StrEnum):
    """Order of a node's stage queues; see `services.node_agent.core`."""

    FIFO = "fifo"
    INFERENCE_FIRST = "inference_first"


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """What a node told when it joined."""

    node_id: str
    num_stages: int
    latency: NodeLatency
    max_inflight_inference: int = 64
    #: Most requests it decodes together.
    max_batch: int = 16
    max_context_tokens: int = 1 << 30
    kv_capacity_tokens: int = 1 << 30
    #: Most pieces its runtime can cut a training operation into; 1: it cannot.
    max_training_parts: int = 1
    #: "async" (A-PP), or one accumulation group of a job at a time (S-PP): "gpipe", "1f1b".
    training_schedule: str = "async"
    #: Tokens of KV cache it keeps for sessions between their turns; 0: it keeps none.
    prefix_cache_tokens: int = 0
    #: What it keeps serves within an epoch of its weights: step // epoch_steps.
    epoch_steps: int = 64
    #: Most new tokens of one prefill; micro-batches between forward and backward; what its weights do at a step, and
    #: groups whose gradients a stage holds. See `services.node_agent.core.types.NodeCoreConfig`.
    max_prefill_tokens: int = 2048
    max_inflight_training: int = 2
    weight_handling: str = "drain"
    gradient_buffers: int = 1
    #: Of its process; 0: not told.
    incarnation: int = 0
    #: When the newest optimizer step that its weights contain was made; None: they were never trained.
    trained_s: float | None = None
    #: Most new tokens of an inference op that may cut prompts into pieces and decode; 0: prompts are computed whole.
    max_batch_tokens: int = 0
    kv_block_tokens: int = 1

    @property
    def synchronous_training(self) -> bool:
        """Whether it trains a group at a time: the scheduler's bound on micro-batches in flight is not for it."""
        return self.training_schedule != "async"
