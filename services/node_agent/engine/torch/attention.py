"""Causal attention over packed sequences: rows of several sequences behind each other, no padding.

Shapes: T rows, heads, kv_heads, head_dim; queries (T, heads, head_dim), keys and values (T, kv_heads, head_dim).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class Attend(Protocol):
    """What a decoder layer calls; `layer` counts from 0 within the stage."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention output, (T, heads, head_dim)."""
        ...


@dataclass(frozen=True, slots=True)
class PackedRuns:
    """Runs of neighbouring sequences of equal length, each computed as one batch: (count, length) per run."""

    runs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "PackedRuns":
        """Group sequence lengths, in order."""
        runs: list[tuple[int, int]] = []
        for length in lengths:
            if runs and runs[-1][1] == length:
                runs[-1] = (runs[-1][0] + 1, length)
            else:
                runs.append((1, length))
        return cls(tuple(runs))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Every row attends to the rows of its own sequence up to itself."""
        if len(self.runs) == 1:
            return _attend_run(query, key, value, *self.runs[0], scale)
        sizes = [count * length for count, length in self.runs]
        pieces = zip(*(torch.split(rows, sizes) for rows in (query, key, value)), self.runs, strict=True)
        return torch.cat([_attend_run(q, k, v, count, length, scale) for q, k, v, (count, length) in pieces])


def _attend_run(query: Tensor, key: Tensor, value: Tensor, count: int, length: int, scale: float) -> Tensor:
    heads, head_dim = query.shape[1:]
    kv_heads = key.shape[1]
    output = functional.scaled_dot_product_attention(
        query.view(count, length, heads, head_dim).transpose(1, 2),
        key.view(count, length, kv_heads, head_dim).transpose(1, 2),
        value.view(count, length, kv_heads, head_dim).transpose(1, 2),
        is_causal=True,
        scale=scale,
        enable_gqa=heads != kv_heads,
    )
    return output.transpose(1, 2).reshape(count * length, heads, head_dim)


@dataclass(frozen=True, slots=True)
class TrainingAttention:
    """Attention of a micro-batch: nothing cached."""

    packed: PackedRuns

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See Attend."""
        del layer
        return self.packed.attend(query, key, value, scale)
