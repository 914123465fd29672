"""Reads and writes safetensors files piece by piece, without holding a model in memory.

The safetensors library loads and saves whole tensors; weights that travel between nodes are cut into chunks, and a
mean of replicas is made block by block. Format: 8 bytes little-endian header length, a JSON header, the data.
"""

import json
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

#: Bytes per element by safetensors name, of the types weights have.
ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a file: safetensors type name, shape, and its place in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def num_bytes(self) -> int:
        """Size of its data. Raises ValueError for a type that is not a weight's."""
        if self.dtype not in ELEMENT_BYTES:
            raise ValueError(f"type {self.dtype} is none of {', '.join(ELEMENT_BYTES)}")
        return prod(self.shape) * ELEMENT_BYTES[self.dtype]


class TensorFile:
    """A memory-mapped file of tensors. Stays readable when the file is removed meanwhile; close it."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = dict(tensors)
        size = path.stat().st_size
        for name, info in self.tensors.items():
            if info.begin + info.num_bytes > size:
                raise ValueError(f"{path} is cut off: {name} ends at byte {info.begin + info.num_bytes} of {size}")
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else None

    @classmethod
    def open(cls, path: Path, prefix: str = "") -> "TensorFile":
        """Map a safetensors file; of its tensors those whose names begin with `prefix`, which is left out. Raises
        OSError, or ValueError when it is none."""
        chosen = {name: info for name, info in read_header(path).items() if name.startswith(prefix)}
        return cls(path, {name.removeprefix(prefix): info for name, info in chosen.items()})

    def read(self, name: str, offset: int, count: int) -> bytes:
        """At most `count` bytes of a tensor's data from byte `offset` on. Raises KeyError."""
        info = self.tensors[name]
        begin, end = info.begin + offset, info.begin + min(offset + count, info.num_bytes)
        return b"" if self._map is None else self._map[begin:end]

    def close(self) -> None:
        """Unmap; idempotent."""
        if self._map is not None:
            self._map.close()

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of a safetensors file in the order of their data. Raises OSError, or ValueError when it is none."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER_BYTES + 1
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"{path} is not a safetensors file")
        header = json.loads(file.read(length))
    try:
        tensors = {
            name: TensorInfo(entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a safetensors file: bad header") from error
    return dict(sorted(tensors.items(), key=lambda item: item[1].begin))


def write_tensors(
    path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]], data: Callable[[str], Iterator[bytes]]
) -> None:
    """Write a safetensors file of (name, type, shape), taking each tensor's bytes from `data` piece by piece.

    The file appears under its name only when it is complete. Raises OSError, or ValueError when the pieces of a tensor
    do not add up to its size.
    """
    # Whoever loads a model wants to know for which library it was written.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    sizes: dict[str, int] = {}
    end = 0
    for name, dtype, shape in tensors:
        sizes[name] = TensorInfo(dtype, shape, 0).num_bytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + sizes[name]]}
        end += sizes[name]
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            for name, size in sizes.items():
                written = 0
                for piece in data(name):
                    written += file.write(piece)
                if written != size:
                    raise ValueError(f"{name} has {written} bytes instead of {size}")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
