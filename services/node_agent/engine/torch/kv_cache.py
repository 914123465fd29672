"""Paged key/value cache of one stage: a pool of blocks per layer, and a table of blocks per request.

A request takes a block when its tokens reach it, so that what it holds is what it uses, rounded up to a block. Who may
hold how much is decided by the node core, which counts in the same blocks; a full pool is its mistake, and an error.
Blocks are handed out lowest first: those in use stay close together, and a decode batch can run on a slice of the pool
instead of a copy. On the CPU memory is taken when a block is first written.
"""

import heapq
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from services.node_agent.engine.torch.host_memory import to_host


class KvCacheFull(RuntimeError):
    """No block is left; the message holds the numbers."""


@dataclass(frozen=True, slots=True)
class KvShape:
    """Per layer and position: kv_heads * head_dim elements of `dtype` for the keys, and as many for the values."""

    num_layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    #: Positions of a block.
    block_tokens: int = 64

    @property
    def block_bytes(self) -> int:
        """One block in every layer, keys and values."""
        return 2 * self.num_layers * self.kv_heads * self.head_dim * self.block_tokens * self.dtype.itemsize

    def num_blocks(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_tokens)


@dataclass(slots=True)
class KvEntry:
    """A request's cache: its blocks in the order of positions, and the tokens whose keys and values they hold."""

    blocks: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    #: In host memory instead of blocks: (2, layers, n, kv_heads, block_tokens, head_dim).
    away: Tensor | None = None

    @property
    def used(self) -> int:
        """Positions filled."""
        return len(self.token_ids)


class KvCache:
    """Blocks by request id. keys[layer], values[layer]: (num_blocks, kv_heads, block_tokens, head_dim)."""

    def __init__(self, shape: KvShape, num_blocks: int) -> None:
        self.shape = shape
        self.num_blocks = num_blocks
        size = (num_blocks, shape.kv_heads, shape.block_tokens, shape.head_dim)
        self.keys = [_zeros(size, shape) for _ in range(shape.num_layers)]
        self.values = [_zeros(size, shape) for _ in range(shape.num_layers)]
        # A heap; blocks from `_fresh` on have never been used.
        self._free: list[int] = []
        self._fresh = 0
        self._entries: dict[str, KvEntry] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def used_blocks(self) -> int:
        """Blocks that requests hold."""
        return self._fresh - len(self._free)

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks that requests hold."""
        return self.used_blocks * self.shape.block_bytes

    def open(self, request_id: str) -> KvEntry:
        """An empty cache for a request; what it held before is dropped."""
        self.free(request_id)
        entry = self._entries[request_id] = KvEntry()
        return entry

    def take_over(self, request_id: str, earlier_id: str) -> KvEntry:
        """The cache of an ended request becomes this one's; an empty one when it has none."""
        entry = self._entries.pop(earlier_id, None) or KvEntry()
        self.free(request_id)
        self._entries[request_id] = entry
        return entry

    def copy(self, request_id: str, other_id: str) -> None:
        """An empty cache becomes a copy of another request's. Raises KeyError, ValueError, and KvCacheFull."""
        source, entry = self.present(other_id), self.open(request_id)
        self.grow(entry, source.used)
        device = self.shape.device
        count = len(entry.blocks)
        there, here = (torch.tensor(e.blocks[:count], dtype=torch.long, device=device) for e in (source, entry))
        for pool in (*self.keys, *self.values):
            pool[here] = pool[there]
        entry.token_ids = source.token_ids.copy()

    def grow(self, entry: KvEntry, tokens: int) -> None:
        """Give an entry the blocks of `tokens` positions in all. Raises KvCacheFull; nothing has changed then."""
        missing = self.shape.num_blocks(tokens) - len(entry.blocks)
        if missing > len(self._free) + self.num_blocks - self._fresh:
            raise KvCacheFull(
                f"{missing} blocks of {self.shape.block_tokens} tokens are needed; "
                f"{self.used_blocks} of {self.num_blocks} are in use"
            )
        for _ in range(missing):
            entry.blocks.append(self._take_block())

    def trim(self, entry: KvEntry, tokens: int) -> None:
        """Keep the first `tokens` positions."""
        del entry.token_ids[tokens:]
        self._release(entry, self.shape.num_blocks(tokens))

    def _release(self, entry: KvEntry, kept: int) -> None:
        for block in entry.blocks[kept:]:
            heapq.heappush(self._free, block)
        del entry.blocks[kept:]

    def offload(self, request_id: str) -> None:
        """To host memory. Raises KeyError for a request without a cache."""
        entry = self.entry(request_id)
        if entry.away is not None:
            return
        blocks = torch.tensor(entry.blocks, dtype=torch.long, device=self.shape.device)
        pools = [torch.stack([pool[blocks] for pool in pools]) for pools in (self.keys, self.values)]
        entry.away = to_host(torch.stack(pools))
        self._release(entry, 0)

    def reload(self, request_id: str) -> None:
        """Back from host memory, if it is there. Raises KeyError, and KvCacheFull when nothing has changed."""
        entry = self.entry(request_id)
        if entry.away is None:
            return
        self.grow(entry, entry.used)
        blocks = torch.tensor(entry.blocks, dtype=torch.long, device=self.shape.device)
        for pools, away in zip((self.keys, self.values), entry.away, strict=True):
            for pool, rows in zip(pools, away, strict=True):
                pool[blocks] = rows.to(pool.device)
        entry.away = None

    def free(self, request_id: str) -> None:
        """Drop a request's cache; unknown ids are ignored."""
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            self.trim(entry, 0)

    def entry(self, request_id: str) -> KvEntry:
        """Raises KeyError for a request without a cache."""
        entry = self._entries.get(request_id)
        if entry is None:
            raise KeyError(f"request {request_id} has no KV cache on this stage")
        return entry

    def present(self, request_id: str) -> KvEntry:
        """As `entry`; raises ValueError when it is in host memory."""
        entry = self.entry(request_id)
        if entry.away is not None:
            raise ValueError(f"the KV cache of request {request_id} is in host memory")
        return entry

    def read(self, layer: int, entry: KvEntry, tokens: int) -> tuple[Tensor, Tensor]:
        """Copies of the first `tokens` keys and values of a layer, each (kv_heads, tokens, head_dim)."""
        shape = self.shape
        blocks = torch.tensor(entry.blocks[: shape.num_blocks(tokens)], dtype=torch.long, device=shape.device)

        def gathered(pool: Tensor) -> Tensor:
            return pool[blocks].transpose(0, 1).reshape(shape.kv_heads, -1, shape.head_dim)[:, :tokens]

        return gathered(self.keys[layer]), gathered(self.values[layer])

    def _take_block(self) -> int:
        if self._free:
            return heapq.heappop(self._free)
        self._fresh += 1
        return self._fresh - 1


@dataclass(frozen=True, slots=True)
class KvWrite:
    """Puts new keys and values into the pool. `source`: which rows, None for all; `target`: (row, head) -> pool row."""

    cache: KvCache
    source: Tensor | None
    target: Tensor

    def __call__(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Write one layer's new keys and values, (T, kv_heads, head_dim)."""
        cache = self.cache
        if self.source is not None:
            key, value = key.index_select(0, self.source), value.index_select(0, self.source)
        head_dim = cache.shape.head_dim
        for pool, rows in ((cache.keys[layer], key), (cache.values[layer], value)):
            pool.view(-1, head_dim).index_copy_(0, self.target, rows.reshape(-1, head_dim))


def plan_write(
    cache: KvCache, entries: Sequence[KvEntry], spans: Sequence[tuple[int, int, int]], num_rows: int
) -> KvWrite:
    """How to cache a packed batch of `num_rows` rows.

    spans: for each entry (first packed row, first position, number of positions); its blocks are there.
    """
    shape = cache.shape
    size = shape.block_tokens
    sources: list[int] = []
    rows: list[int] = []
    for entry, (row, position, count) in zip(entries, spans, strict=True):
        sources.extend(range(row, row + count))
        blocks = entry.blocks
        rows.extend(blocks[p // size] * shape.kv_heads * size + p % size for p in range(position, position + count))
    heads = torch.arange(0, shape.kv_heads * size, size, device=shape.device)
    target = torch.tensor(rows, device=shape.device).unsqueeze(1) + heads
    whole = len(sources) == num_rows and sources == list(range(num_rows))
    return KvWrite(cache, None if whole else torch.tensor(sources, device=shape.device), target.view(-1))


def _zeros(size: tuple[int, ...], shape: KvShape) -> Tensor:
    """Zeros, so that positions never written cannot bring NaN into a product with weight zero."""
    num_bytes = math.prod(size) * shape.dtype.itemsize
    if shape.device.type != "cpu" or not num_bytes:
        return torch.zeros(size, dtype=shape.dtype, device=shape.device)
    # torch would touch every page.
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    return torch.frombuffer(pages, dtype=shape.dtype).view(size)
