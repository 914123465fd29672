"""Blocks of an arena: which bytes hold a tensor that somebody may still read. Needs no torch.

Every block has a header in host memory that all workers see. Its writer puts the sequence number of the content there,
its reader marks it as released.
"""

import mmap
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass

ALIGNMENT = 64
#: Block header: sequence number of the content, sequence number last released.
_HEADER = struct.Struct("<QQ")
_RELEASED = struct.Struct("<Q")
#: Where a block's tensor begins: aligned, because it is computed with where it lies.
DATA = ALIGNMENT


@dataclass(slots=True, eq=False)
class Block:
    """`size` bytes from `offset` on, header included. tasks: that the content belongs to; None: not published yet."""

    offset: int
    size: int
    sequence: int
    tasks: set[str] | None = None


class Headers:
    """Headers of the blocks of one area, `first` bytes into a shared memory file."""

    def __init__(self, file: mmap.mmap, first: int = 0) -> None:
        self._file = file
        self._first = first

    def begin(self, offset: int, sequence: int) -> None:
        """Another content is written from now on: a reader of the one before that comes too late sees it."""
        _HEADER.pack_into(self._file, self._first + offset, sequence, 0)

    def holds(self, offset: int, sequence: int) -> bool:
        """Whether a block still has this content, unreleased."""
        found, released = _HEADER.unpack_from(self._file, self._first + offset)
        return bool(found == sequence and released != sequence)

    def release(self, offset: int, sequence: int) -> None:
        """Nobody reads this content any more. The block may hold another one already."""
        if not self._file.closed and self.holds(offset, sequence):
            _RELEASED.pack_into(self._file, self._first + offset + _RELEASED.size, sequence)


class Blocks:
    """The blocks that a worker writes, in an area of `size` bytes."""

    def __init__(self, headers: Headers, size: int, sequences: Iterator[int]) -> None:
        self._headers = headers
        self.size = size
        self._sequences = sequences
        self._blocks: list[Block] = []

    def __len__(self) -> int:
        """Blocks in use, and some whose release was not noticed yet."""
        return len(self._blocks)

    def reserve(self, num_bytes: int) -> Block | None:
        """A block for a tensor of `num_bytes` bytes: the first gap that is large enough, lowest address first."""
        needed = -(-(DATA + num_bytes) // ALIGNMENT) * ALIGNMENT
        self._blocks = [block for block in self._blocks if self._headers.holds(block.offset, block.sequence)]
        start = 0
        place = len(self._blocks)
        for index, block in enumerate(self._blocks):
            if block.offset - start >= needed:
                place = index
                break
            start = block.offset + block.size
        if start + needed > self.size:
            return None
        block = Block(start, needed, next(self._sequences))
        self._blocks.insert(place, block)
        self._headers.begin(start, block.sequence)
        return block

    def reserved(self, offset: int) -> Block | None:
        """The block that begins there, when nothing was published in it yet."""
        return next((block for block in self._blocks if block.offset == offset and block.tasks is None), None)

    def give_up(self) -> None:
        """Free blocks that nothing was published in."""
        if any(block.tasks is None for block in self._blocks):
            self._blocks = [block for block in self._blocks if block.tasks is not None]

    def forget(self, task_ids: Collection[str]) -> None:
        """Free published blocks all of whose tasks are forgotten."""
        for block in self._blocks:
            if block.tasks is not None:
                block.tasks.difference_update(task_ids)
        self._blocks = [block for block in self._blocks if block.tasks is None or block.tasks]
