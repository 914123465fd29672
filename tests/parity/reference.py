"""The unsplit transformers model and a plain torch training loop: what the engine must equal."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel, get_scheduler
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from services.node_agent.engine.training_ops import Example, OptimizerSpec


def _norm_in_own_dtype(self: LlamaRMSNorm, rows: Tensor) -> Tensor:
    scale = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * (rows * scale)


_ORIGINAL_NORM = LlamaRMSNorm.forward


@contextmanager
def exact_norms() -> Iterator[None]:
    """transformers rounds to float32 inside the norm of a float64 Llama. That noise would hide errors of 1e-9, so the
    reference normalises in float64; one test compares with the unchanged class."""
    with _norms(_norm_in_own_dtype):
        yield


@contextmanager
def original_norms() -> Iterator[None]:
    """The class as transformers has it, within `exact_norms`."""
    with _norms(_ORIGINAL_NORM):
        yield


@contextmanager
def _norms(forward: Callable[[LlamaRMSNorm, Tensor], Tensor]) -> Iterator[None]:
    before = LlamaRMSNorm.forward
    LlamaRMSNorm.forward = forward
    try:
        yield
    finally:
        LlamaRMSNorm.forward = before


def load_reference(path: Path, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The model without dropout."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    return model.eval()


def full_logits(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    """Logits (tokens, vocab) of one sequence."""
    with torch.no_grad():
        return model(torch.tensor([list(token_ids)])).logits[0]


def example_losses(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """Mean loss over all label tokens of a micro-batch, with its graph."""
    losses = []
    for example in examples:
        logits = model(torch.tensor([example.token_ids])).logits[0]
        first = max(1, example.num_context_tokens)
        targets = torch.tensor(example.token_ids[first:], dtype=torch.long)
        losses.append(functional.cross_entropy(logits[first - 1 : -1], targets, reduction="none"))
    return torch.cat(losses).mean()


def named_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Gradients by full-model name."""
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def named_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters by full-model name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class PlainLoop:
    """AdamW, schedule and clipping on the unsplit model."""

    def __init__(self, model: PreTrainedModel, spec: OptimizerSpec) -> None:
        self.model = model
        self._spec = spec
        self._optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=spec.learning_rate,
            betas=spec.betas,
            eps=spec.eps,
            weight_decay=spec.weight_decay,
            foreach=False,
        )
        self._scheduler = get_scheduler(spec.lr_schedule, self._optimizer, spec.warmup_steps, spec.total_steps)

    def gradient(self, examples: Sequence[Example], loss_scale: float = 1.0) -> dict[str, Tensor]:
        """Gradient of one micro-batch at the current weights; nothing is accumulated."""
        loss = example_losses(self.model, examples) * loss_scale
        parameters = dict(self.model.named_parameters())
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    def apply(self, gradients: Sequence[dict[str, Tensor]]) -> None:
        """One step with the sum of gradients."""
        for name, parameter in self.model.named_parameters():
            parameter.grad = sum((gradient[name] for gradient in gradients[1:]), gradients[0][name].clone())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._spec.max_grad_norm)
        self._optimizer.step()
        self._scheduler.step()
