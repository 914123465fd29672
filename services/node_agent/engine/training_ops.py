"""Ops that train: forward, backward, optimizer step, and what they train with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.node_agent.engine.handle import Handle


@dataclass(frozen=True, slots=True)
class Example:
    """One training example; labels are tokens at index >= max(1, num_context_tokens)."""

    token_ids: tuple[int, ...]
    num_context_tokens: int = 0


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """AdamW and its schedule (by its name in transformers: constant, constant_with_warmup, linear, cosine)."""

    learning_rate: float = 1e-4
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    total_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """LoRA of a training job, in the terms of peft's LoraConfig.

    adapter_id: the job's id. target_modules: projections by the last part of their names, or "all-linear"; empty: what
    peft takes for the model. isolated: it serves requests that name it, on the model's own weights; otherwise it is
    part of the served model, like the other adapters that are not isolated.
    """

    adapter_id: str
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    isolated: bool = False

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> "AdapterSpec":
        """From `dataclasses.asdict` by way of JSON."""
        return cls(**{**stored, "target_modules": tuple(stored["target_modules"])})


@dataclass(frozen=True, slots=True)
class TrainForward:
    """Forward of a micro-batch, or one of the `parts` pieces it is cut into; keeps what its backward needs.

    Pieces run in order and each repeats the examples. The first takes `hidden`, the last returns the output, and on the
    last stage the loss of the whole micro-batch. `loss_scale` multiplies the loss before backward (1 / accumulation).
    optimizer: of the job; memory for its state is taken now, so that its step cannot lack it. None: at the step.
    adapter: what the job trains, named by the job's id; None: all weights. measures: only the loss is wanted, without
    dropout, of an adapter that is there.
    """

    op_id: int
    version: int
    task_id: str
    examples: tuple[Example, ...]
    loss_scale: float = 1.0
    hidden: Handle | None = None
    part: int = 0
    parts: int = 1
    job_id: str = ""
    optimizer: OptimizerSpec | None = None
    adapter: AdapterSpec | None = None
    measures: bool = False


@dataclass(frozen=True, slots=True)
class TrainBackward:
    """Backward of a micro-batch, or a piece of it, in as many as its forward; `gradient` is None on the last stage.

    group: gradients accumulate per group, until the group's optimizer step.
    tied_gradient: for stage 0 of a model with tied embeddings cut into several stages, what the last stage returned in
    `StageResult.tied_gradient` for this micro-batch; stage 0 owns the embedding. The first piece takes both, the last
    returns the output.
    """

    op_id: int
    task_id: str
    gradient: Handle | None = None
    tied_gradient: Handle | None = None
    group: int = 0
    part: int = 0


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """Apply a group's accumulated gradients; the stage's version rises by one, also when the result has an error.

    grad_norm_sq_total: squared norm of the group's whole gradient, the sum of what the stages' last backwards reported;
    clipping uses it so that S stages clip like one. None: this stage's own norm. When it is not finite every stage
    drops its gradient, keeps its weights and reports an error.
    tied_weight: for the last stage of a model with tied embeddings cut into several stages, stage 0's `output` of this
    step.
    oldest_version: no op on its way to this stage needs older weights; those from this version on are kept, the others
    dropped. None: no such op needs any but the new ones.
    """

    op_id: int
    version: int
    job_id: str
    optimizer: OptimizerSpec
    grad_norm_sq_total: float | None = None
    tied_weight: Handle | None = None
    group: int = 0
    oldest_version: int | None = None
