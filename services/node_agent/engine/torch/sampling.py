"""Picks tokens from logits.

The randomness of a token is a hash of the request's seed and of the token's index in its sequence. So a request draws
the same numbers whatever it is batched with, nothing has to be kept between tokens, and a request continued on another
node (prompt + delivered tokens) goes on exactly where it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.node_agent.engine.inference_ops import Sampling

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Draw:
    """A token to pick. `index`: where it will stand, counted from the first token of the prompt."""

    sampling: Sampling
    index: int


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) for (seed, index): two rounds of the SplitMix64 finaliser (Steele et al., OOPSLA 2014)."""
    mixed = _finalise((_finalise(seed & _MASK) + index * 0x9E3779B97F4A7C15) & _MASK)
    return (mixed >> 11) / (1 << 53)


def pick_tokens(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """One token per row of (n, vocab) logits. Temperature, then top_k, then top_p, as transformers orders them."""
    greedy = [row for row, draw in enumerate(draws) if draw.sampling.temperature <= 0.0]
    plain = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0.0 and not _truncates(draw.sampling)]
    truncated = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0.0 and _truncates(draw.sampling)]
    picked = [0] * len(draws)
    for rows, pick in ((greedy, _greedy), (plain, _plain), (truncated, _truncated)):
        if rows:
            chosen = logits if len(rows) == len(draws) else logits[rows]
            for row, token in zip(rows, pick(chosen, [draws[row] for row in rows]), strict=True):
                picked[row] = token
    return picked


def _truncates(sampling: Sampling) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0


def _greedy(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    del draws
    tokens: list[int] = logits.argmax(-1).tolist()
    return tokens


def _plain(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    tokens: list[int] = _invert(_probabilities(logits, draws).cumsum(-1), draws).tolist()
    return tokens


def _truncated(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    ordered, order = _probabilities(logits, draws).sort(dim=-1, descending=True, stable=True)
    vocab = logits.shape[-1]
    kept = torch.tensor([draw.sampling.top_k or vocab for draw in draws], device=logits.device).unsqueeze(1)
    ordered = ordered.masked_fill(torch.arange(vocab, device=logits.device) >= kept, 0.0)
    top_p = torch.tensor([draw.sampling.top_p for draw in draws], dtype=ordered.dtype, device=logits.device)
    mass = ordered.sum(-1, keepdim=True)
    before = ordered.cumsum(-1) - ordered
    # The most likely token always stays; a token stays when those before it do not reach top_p yet.
    outside = before >= top_p.unsqueeze(1) * mass
    outside[:, 0] = False
    places = _invert(ordered.masked_fill(outside, 0.0).cumsum(-1), draws)
    tokens: list[int] = order.gather(-1, places.unsqueeze(-1)).squeeze(-1).tolist()
    return tokens


def _probabilities(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    temperatures = torch.tensor([draw.sampling.temperature for draw in draws], dtype=torch.float64)
    return (logits.double() / temperatures.to(logits.device).unsqueeze(1)).softmax(-1)


def _invert(cumulative: Tensor, draws: Sequence[Draw]) -> Tensor:
    """First index whose cumulative mass exceeds the draw's share of the total."""
    shares = torch.tensor([uniform(draw.sampling.seed, draw.index) for draw in draws], dtype=torch.float64)
    targets = shares.to(cumulative.device).unsqueeze(1) * cumulative[:, -1:]
    places = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    # Rounding may put a target on the total itself: take the last index that adds mass.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous()).squeeze(-1)
    return torch.minimum(places, last)


def _finalise(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
