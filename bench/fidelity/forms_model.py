"""Small random-weight Llamas that differ in their attention and their number format, timed on one thread."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

FLOAT32, BFLOAT16, INT8 = WEIGHTS = ("float32", "bfloat16", "int8")
ATTENTIONS = ("eager", "sdpa")

_VOCABULARY = 512
_HEADS = 4


class Variant(NamedTuple):
    """attention: "eager" or "sdpa". weights: "float32", "bfloat16" or "int8" (weight-only)."""

    attention: str
    weights: str


class Int8Linear(nn.Module):
    """A linear layer with weights of 8 bits and a scale per output, multiplied in the format of its input."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127.0
        self.register_buffer("weight", torch.round(linear.weight.detach() / scale).to(torch.int8))
        self.register_buffer("scale", scale.squeeze(1))

    def forward(self, rows: Tensor) -> Tensor:
        """Products with every output's weights, scaled afterwards: a vector instead of a matrix of scalings."""
        return functional.linear(rows, self.weight.to(rows.dtype)) * self.scale


def load(variant: Variant, *, hidden: int, layers: int, max_length: int) -> Any:
    """The model of a variant; equal weights for all of them before rounding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        vocab_size=_VOCABULARY,
        max_position_embeddings=max_length,
        attn_implementation=variant.attention,
    )
    model = LlamaForCausalLM(config).eval()
    if variant.weights == BFLOAT16:
        return model.to(torch.bfloat16)
    if variant.weights == INT8:
        for layer in model.model.layers:
            for block in (layer.self_attn, layer.mlp):
                for name, child in list(block.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(block, name, Int8Linear(child))
    return model


def prefill_s(model: Any, batch: int, length: int) -> float:
    """Seconds of a forward over whole prompts, the logits of the last token alone."""
    with torch.inference_mode():
        return _timed(lambda tokens: model(input_ids=tokens, use_cache=False, logits_to_keep=1), batch, length)


def train_s(model: Any, batch: int, length: int) -> float:
    """Seconds of a forward and a backward; the gradients are dropped."""
    try:
        return _timed(
            lambda tokens: model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward(), batch, length
        )
    finally:
        model.zero_grad(set_to_none=True)


def _timed(work: Callable[[Tensor], object], batch: int, length: int) -> float:
    tokens = torch.randint(0, _VOCABULARY, (batch, length))
    begin_s = time.perf_counter()
    work(tokens)
    return time.perf_counter() - begin_s
