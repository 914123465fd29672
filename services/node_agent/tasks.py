"""What the agent knows about a task besides what its core knows: tokens, hyperparameters and results so far."""

from dataclasses import dataclass, field

from lemix.errors import LemixError
from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.node_agent.engine.inference_ops import Sampling
from services.node_agent.engine.training_ops import AdapterSpec, Example, OptimizerSpec
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
    #: Isolated adapter that serves it; empty: the model itself.
    adapter_id: str = ""
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

    def completes_stop(self, token_id: int) -> bool:
        """Whether a new token completes a stop string."""
        if self.stop_text is None:
            return False
        self.stop_text.add((token_id,))
        return self.stop_text.stopped


@dataclass(slots=True)
class MicrobatchTask:
    """A training micro-batch on this node."""

    task_id: str
    job_id: str
    sequence: int
    examples: tuple[Example, ...]
    optimizer: OptimizerSpec
    accumulation: int = 1
    #: What its job trains; None: all weights.
    adapter: AdapterSpec | None = None
    #: How often its job went on after it had ended.
    attempt: int = 0
    #: The job's last micro-batch.
    last: bool = False
    loss: float | None = None
    label_tokens: int = 0
    #: The node had no optimizer state of its job when it was started.
    fresh_optimizer: bool = False
    #: Weights step after its optimizer step; 0 until that step was started.
    weight_step: int = 0
    error: LemixError | None = None
    #: The error is a loss or a gradient that is not finite.
    skipped: bool = False


Task = RequestTask | MicrobatchTask
