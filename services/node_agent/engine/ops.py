"""Every op a stage worker runs.

A prefill, decode, training forward or snapshot runs with the weights of the version it was stamped with, also on a
stage that is newer by now, as long as the stage keeps them; with any other version it is an error. Optimizer steps and
changes of weights are for the stage's current version.
"""

from dataclasses import dataclass

from services.node_agent.engine.inference_ops import Decode, Prefill
from services.node_agent.engine.training_ops import OptimizerStep, TrainBackward, TrainForward
from services.node_agent.engine.weight_ops import LoadWeights, RestoreCheckpoint, SaveCheckpoint, Snapshot


@dataclass(frozen=True, slots=True)
class Forget:
    """Free a request's KV cache, a micro-batch's saved activations and, by job id, a job's optimizer state.

    Runs between ops; unknown ids are ignored. Outputs of these tasks that nobody read yet are released. adapter_ids:
    jobs whose adapter goes as well; no request that it serves is left.
    """

    op_id: int
    task_ids: tuple[str, ...]
    adapter_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Offload:
    """Move the KV caches of requests, and the saved activations of micro-batches, to host memory. Unknown ids are
    ignored: a task that has just ended may have left."""

    op_id: int
    task_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reload:
    """Move them back; nothing runs with what is in host memory."""

    op_id: int
    task_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Measure:
    """Time one op on this stage with made-up data; weights, KV cache and optimizer state are left as they were.

    kind: an `OpKind` value; train_forward returns forward and backward durations, offload those of both ways.
    beside: kind of op that the other stages run meanwhile; only who makes durations up needs to know.
    Prefill: behind `cached_tokens` of each sequence, together with `decodes` requests of `decode_length` context
    tokens. Offload: `num_bytes` of KV cache, rounded to whole blocks.
    """

    op_id: int
    kind: str
    batch: int
    length: int
    repetitions: int
    warmup: int
    cached_tokens: int = 0
    decodes: int = 0
    decode_length: int = 0
    num_bytes: int = 0
    beside: str = ""


StageOp = (
    Prefill
    | Decode
    | TrainForward
    | TrainBackward
    | OptimizerStep
    | Snapshot
    | LoadWeights
    | SaveCheckpoint
    | RestoreCheckpoint
    | Forget
    | Offload
    | Reload
    | Measure
)


#: Ops after which a stage's version is one higher, whatever became of them.
VersionedChange = OptimizerStep | LoadWeights | RestoreCheckpoint
