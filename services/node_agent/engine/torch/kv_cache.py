"""Key/value cache of one stage for requests of ragged lengths that join and leave between iterations.

A request reserves prompt + max_tokens positions in a slab of its length class (powers of two). A slab is one tensor
whose used slots stay a prefix, so a batch of all its requests is a slice of it, not a gathered copy; short requests
never pay for the longest one. Every slab in a decode batch costs one attention call per layer, so the smallest class is
large enough for most chat turns: splitting those further costs more in calls than it saves in masked positions.
Reserved memory is at most twice the reserved tokens (or the smallest class), times the slot growth (two); on Linux
pages of unused positions are not even touched.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SMALLEST_CLASS = 512
_FIRST_SLOTS = 4


class KvCacheFull(RuntimeError):
    """The reservation does not fit; the message holds the numbers."""


@dataclass(frozen=True, slots=True)
class KvShape:
    """Per layer and position: kv_heads * head_dim elements of `dtype` for the keys, and as many for the values."""

    num_layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


class Slab:
    """Slots of one length class. keys[layer], values[layer]: (slots, length, kv_heads, head_dim)."""

    def __init__(self, shape: KvShape, length: int) -> None:
        self.length = length
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.owners: list[str] = []
        self._shape = shape
        self._capacity = 0

    def add(self, request_id: str) -> int:
        """Take the next slot; doubles the slab when it is full."""
        if len(self.owners) == self._capacity:
            self._grow(max(_FIRST_SLOTS, 2 * self._capacity))
        self.owners.append(request_id)
        return len(self.owners) - 1

    def remove(self, slot: int, used: int) -> str | None:
        """Free a slot. The last slot moves into the hole; returns whose it was. `used`: positions it holds."""
        last = len(self.owners) - 1
        moved = self.owners.pop()
        if slot == last:
            return None
        self.owners[slot] = moved
        for tensor in (*self.keys, *self.values):
            tensor[slot, :used] = tensor[last, :used]
        return moved

    def flat(self, tensor: Tensor) -> Tensor:
        """One layer's keys or values as (slots * length, kv_heads, head_dim): row = slot * length + position."""
        return tensor.view(-1, self._shape.kv_heads, self._shape.head_dim)

    def _grow(self, capacity: int) -> None:
        shape = self._shape
        size = (shape.num_layers, 2, capacity, self.length, shape.kv_heads, shape.head_dim)
        grown = torch.zeros(size, dtype=shape.dtype, device=shape.device)
        used = len(self.owners)
        for layer in range(len(self.keys)):
            grown[layer, 0, :used] = self.keys[layer][:used]
            grown[layer, 1, :used] = self.values[layer][:used]
        self.keys = [grown[layer, 0] for layer in range(shape.num_layers)]
        self.values = [grown[layer, 1] for layer in range(shape.num_layers)]
        self._capacity = capacity


@dataclass(slots=True)
class KvEntry:
    """Where a request's cache is. `used`: positions filled; `reserved`: positions it may fill."""

    slab: Slab
    slot: int
    reserved: int
    used: int = 0


class KvCache:
    """Reservations by request id, within `capacity_tokens` reserved positions."""

    def __init__(self, shape: KvShape, capacity_tokens: int) -> None:
        self._shape = shape
        self._capacity_tokens = capacity_tokens
        self._slabs: dict[int, Slab] = {}
        self._entries: dict[str, KvEntry] = {}
        self.reserved_tokens = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def reserve(self, request_id: str, tokens: int) -> KvEntry:
        """Give a request `tokens` positions; what it held before is dropped. Raises KvCacheFull."""
        self.free(request_id)
        if self.reserved_tokens + tokens > self._capacity_tokens:
            raise KvCacheFull(
                f"request {request_id} needs {tokens} tokens of KV cache; "
                f"{self.reserved_tokens} of {self._capacity_tokens} are reserved"
            )
        length = max(_SMALLEST_CLASS, 1 << (tokens - 1).bit_length())
        slab = self._slabs.setdefault(length, Slab(self._shape, length))
        entry = KvEntry(slab, slab.add(request_id), tokens)
        self._entries[request_id] = entry
        self.reserved_tokens += tokens
        return entry

    def free(self, request_id: str) -> None:
        """Drop a request's cache; unknown ids are ignored."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return
        slab = entry.slab
        last = self._entries.get(slab.owners[-1], entry)
        moved = slab.remove(entry.slot, last.used)
        if moved is not None:
            self._entries[moved].slot = entry.slot
        if not slab.owners and slab.length > _SMALLEST_CLASS:
            del self._slabs[slab.length]
        self.reserved_tokens -= entry.reserved

    def entry(self, request_id: str) -> KvEntry:
        """Raises KeyError for a request without a cache."""
        entry = self._entries.get(request_id)
        if entry is None:
            raise KeyError(f"request {request_id} has no KV cache on this stage")
        return entry


@dataclass(frozen=True, slots=True)
class KvWrite:
    """Copies rows of new keys and values into one slab. `source`: which rows, None for all; `target`: flat rows."""

    slab: Slab
    source: Tensor | None
    target: Tensor

    def __call__(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Write one layer's new keys and values, (T, kv_heads, head_dim)."""
        slab = self.slab
        if self.source is not None:
            key, value = key.index_select(0, self.source), value.index_select(0, self.source)
        slab.flat(slab.keys[layer]).index_copy_(0, self.target, key)
        slab.flat(slab.values[layer]).index_copy_(0, self.target, value)


def plan_writes(
    entries: Sequence[KvEntry], spans: Sequence[tuple[int, int, int]], num_rows: int, device: torch.device
) -> list[KvWrite]:
    """How to cache a packed batch of `num_rows` rows.

    spans: for each entry (first packed row, first position, number of positions).
    """
    by_slab: dict[int, tuple[Slab, list[int], list[int]]] = {}
    for entry, (row, position, count) in zip(entries, spans, strict=True):
        _, sources, targets = by_slab.setdefault(id(entry.slab), (entry.slab, [], []))
        first = entry.slot * entry.slab.length + position
        sources.extend(range(row, row + count))
        targets.extend(range(first, first + count))
    writes = []
    for slab, sources, targets in by_slab.values():
        source = None if sources == list(range(num_rows)) else torch.tensor(sources, device=device)
        writes.append(KvWrite(slab, source, torch.tensor(targets, device=device)))
    return writes
