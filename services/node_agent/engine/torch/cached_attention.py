"""Attention over the paged KV cache: of prompts, or pieces of them, and of single new tokens.

Rows of an op are packed: those of prompts first, then one per decoding request. Shapes as in `attention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from services.node_agent.engine.torch.attention import PackedRuns
from services.node_agent.engine.torch.kv_cache import KvCache, KvEntry, KvWrite
from services.node_agent.engine.torch.stage import widen

#: A decode batch runs on a slice of the pool when at least this share of it is the batch's, else on a copy.
_DENSE = 0.5


@dataclass(frozen=True, slots=True)
class CachedAttention:
    """Caches the new keys and values of all rows, then attends: prompts one by one, decoding requests together."""

    write: KvWrite
    prompts: "PromptAttention | None"
    decodes: "DecodeAttention | None"

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See attention.Attend."""
        self.write(layer, key, value)
        if self.decodes is None:
            assert self.prompts is not None
            return self.prompts.attend(layer, query, key, value, scale)
        if self.prompts is None:
            return self.decodes.attend(layer, query, scale)
        rows = self.prompts.num_rows
        first = self.prompts.attend(layer, query[:rows], key[:rows], value[:rows], scale)
        return torch.cat([first, self.decodes.attend(layer, query[rows:], scale)])


@dataclass(frozen=True, slots=True)
class PromptAttention:
    """Prompts of `lengths` new rows; of each, `cached` positions are in its entry before them."""

    cache: KvCache
    entries: Sequence[KvEntry]
    lengths: Sequence[int]
    cached: Sequence[int]

    @property
    def num_rows(self) -> int:
        """New rows."""
        return sum(self.lengths)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Every row attends to what is cached of its prompt, and to the rows of its prompt up to itself."""
        if not any(self.cached):
            return PackedRuns.of(self.lengths).attend(query, key, value, scale)
        pieces = zip(*(torch.split(rows, list(self.lengths)) for rows in (query, key, value)), strict=True)
        outputs = []
        for entry, cached, (q, k, v) in zip(self.entries, self.cached, pieces, strict=True):
            if cached:
                outputs.append(_attend_behind(q, k, v, *self.cache.read(layer, entry, cached), scale))
            else:
                outputs.append(PackedRuns.of([len(q)]).attend(q, k, v, scale))
        return torch.cat(outputs)


def _attend_behind(
    query: Tensor, key: Tensor, value: Tensor, cached_keys: Tensor, cached_values: Tensor, scale: float
) -> Tensor:
    """New rows of one sequence behind cached ones, (kv_heads, cached, head_dim)."""
    rows, heads = query.shape[:2]
    keys = torch.cat([cached_keys, key.transpose(0, 1)], 1).unsqueeze(0)
    values = torch.cat([cached_values, value.transpose(0, 1)], 1).unsqueeze(0)
    seen = torch.ones(rows, keys.shape[2], dtype=torch.bool, device=query.device).tril(keys.shape[2] - rows)
    output = functional.scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        keys,
        values,
        attn_mask=seen,
        scale=scale,
        enable_gqa=heads != key.shape[1],
    )
    return output.squeeze(0).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class DecodeAttention:
    """One new row per request, over its blocks.

    Every block is attended to on its own, by its request's query, on the pool as it lies; then each request's blocks
    are combined by the logarithms of their weights (as flash decoding splits long contexts). So nothing is gathered and
    nothing padded to the longest context. (n: blocks looked at, m: most blocks of a request, B: requests.)
    """

    cache: KvCache
    #: The blocks looked at, as a slice of the pool or by number.
    span: tuple[int, int]
    chosen: Tensor | None
    #: (n,): whose query a block gets. In a slice, blocks of others are computed in vain.
    owners: Tensor
    #: (n, 1, 1, block_tokens): -inf behind the last position of a request.
    mask: Tensor
    #: (B * m,): each request's blocks among those looked at. (B, m, 1, 1): -inf where it has fewer.
    table: Tensor
    absent: Tensor

    @classmethod
    def plan(cls, cache: KvCache, entries: Sequence[KvEntry], positions: Sequence[int]) -> "DecodeAttention":
        """positions: of the new tokens, whose blocks are there."""
        shape = cache.shape
        counts = [position // shape.block_tokens + 1 for position in positions]
        blocks = [entry.blocks[:count] for entry, count in zip(entries, counts, strict=True)]
        low, high = min(map(min, blocks)), max(map(max, blocks)) + 1
        is_dense = sum(counts) >= _DENSE * (high - low)
        owners = [0] * (high - low) if is_dense else []
        table: list[list[int]] = []
        for request, own in enumerate(blocks):
            if is_dense:
                places = [block - low for block in own]
                for place in places:
                    owners[place] = request
            else:
                places = list(range(len(owners), len(owners) + len(own)))
                owners += [request] * len(own)
            table.append(places)
        most = max(counts)
        device = shape.device
        mask = torch.zeros(len(owners), shape.block_tokens, dtype=shape.dtype, device=device)
        filled = torch.tensor([position % shape.block_tokens for position in positions], device=device).unsqueeze(1)
        behind = torch.arange(shape.block_tokens, device=device) > filled
        lasts = torch.tensor([places[-1] for places in table], device=device)
        mask[lasts] = torch.zeros(behind.shape, dtype=shape.dtype, device=device).masked_fill_(behind, float("-inf"))
        absent = torch.arange(most, device=device) >= torch.tensor(counts, device=device).unsqueeze(1)
        penalty = torch.zeros(absent.shape, dtype=shape.dtype, device=device).masked_fill_(absent, float("-inf"))
        return cls(
            cache=cache,
            span=(low, high),
            chosen=None if is_dense else torch.tensor([block for own in blocks for block in own], device=device),
            owners=torch.tensor(owners, device=device),
            mask=mask[:, None, None, :],
            table=torch.tensor([p for places in table for p in places + [0] * (most - len(places))], device=device),
            absent=penalty[:, :, None, None],
        )

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """query (B, heads, head_dim) -> the same shape."""
        rows, heads, head_dim = query.shape
        keys, values = self._blocks(self.cache.keys[layer]), self._blocks(self.cache.values[layer])
        # Query heads that share a key head are laid out as query positions, which needs no copy of keys per head.
        grouped = query.view(rows, keys.shape[1], -1, head_dim).index_select(0, self.owners)
        outputs, log_weights = _attend_blocks(grouped, keys, values, self.mask, scale)
        outputs = outputs.index_select(0, self.table)
        if self.absent.shape[1] == 1:
            return outputs.reshape(rows, heads, head_dim)
        by_request = (rows, -1, *log_weights.shape[1:])
        weights = log_weights.index_select(0, self.table).view(by_request).add(self.absent).softmax(1)
        outputs = outputs.view(rows, -1, *outputs.shape[1:]) * weights.to(outputs.dtype).unsqueeze(-1)
        return outputs.sum(1).view(rows, heads, head_dim)

    def _blocks(self, pool: Tensor) -> Tensor:
        return pool[self.span[0] : self.span[1]] if self.chosen is None else pool.index_select(0, self.chosen)


def _attend_blocks(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention within each block, and the logarithm of the sum of its weights.

    query (n, kv_heads, g, head_dim), keys and values (n, kv_heads, block_tokens, head_dim) -> (n, kv_heads, g,
    head_dim) and (n, kv_heads, g).
    """
    if query.device.type == "cpu":
        # What scaled_dot_product_attention calls; that does not return the weights' logarithms.
        output, log_weights = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, attn_mask=mask, scale=scale
        )
        return output, log_weights
    scores = widen(torch.matmul(query * scale, keys.transpose(2, 3))) + mask
    log_weights = scores.logsumexp(-1)
    return torch.matmul((scores - log_weights.unsqueeze(-1)).exp().to(values.dtype), values), log_weights
