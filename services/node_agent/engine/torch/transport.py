"""How activations and gradients get from one stage worker to another.

Each worker writes into its own arena, an anonymous shared memory file the parent created and every worker inherited:
it has no name, so nothing is left behind however the processes end. CUDA tensors are copied through it as well.

A reader on the CPU works on the block itself. A block is freed by its reader (a mark in the block's header), when
nothing refers to what was read any more, or when all of its tasks are forgotten: the node core sends no op of a
forgotten task, so nobody looks at it again. A reader that comes too late notices by the sequence number.
"""

import contextlib
import mmap
import struct
import weakref
from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from services.node_agent.engine.handle import Handle
from services.node_agent.engine.torch.arena import ARENA_BYTES
from services.node_agent.engine.torch.stage import parse_dtype

_ALIGNMENT = 64
#: Block header: sequence number of the content, sequence number last released.
_HEADER = struct.Struct("<QQ")
#: Where a block's tensor begins: aligned, because it is computed with where it lies.
_DATA = _ALIGNMENT
_RELEASED = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies: the arena of `stage`, from byte `offset` on."""

    stage: int
    offset: int
    sequence: int
    dtype: str
    shape: tuple[int, ...]


class ActivationLost(RuntimeError):
    """A handle's tensor is gone: its tasks were forgotten."""


class ArenaFull(RuntimeError):
    """The outputs nobody has read yet leave no room for another one; the message holds the numbers."""


class Transport(Protocol):
    """One worker's end."""

    def put(self, tensor: Tensor, task_ids: Collection[str]) -> Handle:
        """Publish a tensor for another worker; `task_ids` are the tasks it belongs to. Raises ArenaFull."""
        ...

    def take(self, handle: Handle, device: torch.device) -> Tensor:
        """A published tensor, the caller's own from now on; it can be taken once. Raises ActivationLost."""
        ...

    def forget(self, task_ids: Collection[str]) -> None:
        """Release unread tensors all of whose tasks are forgotten."""
        ...

    def close(self) -> None:
        """Let go of the memory."""
        ...


class LocalTransport:
    """Between stages of one process: the handle is the tensor."""

    def put(self, tensor: Tensor, task_ids: Collection[str]) -> Handle:
        """See Transport."""
        del task_ids
        return Handle(tensor.clone())

    def take(self, handle: Handle, device: torch.device) -> Tensor:
        """See Transport."""
        assert isinstance(handle.token, Tensor)
        # Cloned because the tensor may have been made in inference mode, or still be in use by who made it.
        return handle.token.to(device, copy=True)

    def forget(self, task_ids: Collection[str]) -> None:
        """See Transport."""

    def close(self) -> None:
        """See Transport."""


@dataclass(slots=True)
class _Block:
    offset: int
    size: int
    sequence: int
    tasks: set[str]


class SharedTransport:
    """Between processes: arena `stage` is this worker's, the others are read."""

    def __init__(self, stage: int, arena_fds: list[int], arena_bytes: int = ARENA_BYTES) -> None:
        self._stage = stage
        self._size = arena_bytes
        self._arenas = [mmap.mmap(fd, arena_bytes) for fd in arena_fds]
        self._blocks: list[_Block] = []
        self._sequence = 0
        #: What was taken and is in use: stage and sequence number.
        self._taken: set[tuple[int, int]] = set()

    def put(self, tensor: Tensor, task_ids: Collection[str]) -> Handle:
        """See Transport."""
        num_bytes = tensor.numel() * tensor.element_size()
        offset = self._allocate(_DATA + num_bytes, set(task_ids))
        arena = self._arenas[self._stage]
        dtype = str(tensor.dtype).removeprefix("torch.")
        # The header first: a reader whose block was forgotten and is reused here must see that in time.
        _HEADER.pack_into(arena, offset, self._sequence, 0)
        view = torch.frombuffer(arena, dtype=tensor.dtype, count=tensor.numel(), offset=offset + _DATA)
        view.view(tensor.shape).copy_(tensor)
        return Handle(_Place(self._stage, offset, self._sequence, dtype, tuple(tensor.shape)))

    def take(self, handle: Handle, device: torch.device) -> Tensor:
        """See Transport."""
        place = handle.token
        assert isinstance(place, _Place)
        arena = self._arenas[place.stage]
        start, count, dtype = place.offset + _DATA, prod(place.shape), parse_dtype(place.dtype)
        # The tensor's storage, and whatever shares it, keeps this object alive, and nothing else does.
        block = memoryview(arena)[start : start + count * dtype.itemsize]
        tensor = torch.frombuffer(block, dtype=dtype, count=count).view(place.shape)
        if device.type != "cpu":
            tensor = tensor.to(device)
        # Checked after a copy: the block may be reused at any time once all its tasks are forgotten.
        found, released = _HEADER.unpack_from(arena, place.offset)
        if found != place.sequence or released == place.sequence or (place.stage, place.sequence) in self._taken:
            raise ActivationLost(f"an activation from stage {place.stage} was released before it was read")
        self._taken.add((place.stage, place.sequence))
        weakref.finalize(block, self._release, place).atexit = False
        return tensor

    def _release(self, place: _Place) -> None:
        """Nothing refers to a taken tensor any more. Its block may hold another one already."""
        self._taken.discard((place.stage, place.sequence))
        arena = self._arenas[place.stage]
        if not arena.closed and _HEADER.unpack_from(arena, place.offset)[0] == place.sequence:
            _RELEASED.pack_into(arena, place.offset + _RELEASED.size, place.sequence)

    def forget(self, task_ids: Collection[str]) -> None:
        """See Transport."""
        for block in self._blocks:
            block.tasks.difference_update(task_ids)
        self._blocks = [block for block in self._blocks if block.tasks]

    def close(self) -> None:
        """See Transport."""
        for arena in self._arenas:
            # What was taken and is still in use keeps its arena mapped.
            with contextlib.suppress(BufferError):
                arena.close()

    def _allocate(self, num_bytes: int, tasks: set[str]) -> int:
        """First gap that is large enough, lowest address first."""
        needed = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        arena = self._arenas[self._stage]
        self._blocks = [b for b in self._blocks if _HEADER.unpack_from(arena, b.offset)[1] != b.sequence]
        start = 0
        place = len(self._blocks)
        for index, block in enumerate(self._blocks):
            if block.offset - start >= needed:
                place = index
                break
            start = block.offset + block.size
        if start + needed > self._size:
            raise ArenaFull(
                f"an output of {num_bytes} bytes does not fit into stage {self._stage}'s arena of {self._size} bytes; "
                f"{len(self._blocks)} outputs wait to be read"
            )
        self._sequence += 1
        self._blocks.insert(place, _Block(start, needed, self._sequence, tasks))
        return start
