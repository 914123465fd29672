"""What the agent knows about a task besides what its core knows: tokens, hyperparameters and results so far."""

from dataclasses import dataclass, field

from lemix.errors import LemixError
from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.node_agent.engine.base import Example, OptimizerSpec, Sampling
from services.text import OutputText


@dataclass(slots=True)
class RequestTask:
    """An inference request on this node. Times: `taken_s` and `first_token_s` on the monotonic clock, seconds."""

    task_id: str
    taken_s: float
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    reference_ids: tuple[int, ...] = ()
    #: Its text, followed until a stop string; None: it has none.
    stop_text: OutputText | None = None
    generated_ids: list[int] = field(default_factory=list)
    #: One per generated token, or none at all.
    logprobs: list[work_pb2.TokenLogprobs] = field(default_factory=list)
    weight_versions: list[types_pb2.WeightVersion] = field(default_factory=list)
    first_token_s: float | None = None
    staleness_s: float | None = None
    reference_loss: float | None = None
    #: Whether its KV cache was freed; when not although it ended, it is kept for its session.
    kv_freed: bool = False
    error: LemixError | None = None


@dataclass(slots=True)
class MicrobatchTask:
    """A training micro-batch on this node."""

    task_id: str
    job_id: str
    sequence: int
    examples: tuple[Example, ...]
    optimizer: OptimizerSpec
    accumulation: int = 1
    #: The job's last micro-batch.
    last: bool = False
    loss: float | None = None
    label_tokens: int = 0
    #: Weights step after its optimizer step; 0 until that step was started.
    weight_step: int = 0
    error: LemixError | None = None
    #: The error is a loss or a gradient that is not finite.
    skipped: bool = False


Task = RequestTask | MicrobatchTask
