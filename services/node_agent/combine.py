"""Makes one weights file out of several replicas' weights."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from services.node_agent.tensor_file import ELEMENT_BYTES, TensorFile, TensorInfo, write_tensors

_BLOCK_ELEMENTS = 1 << 18


class Replica:
    """The weights of one node: every stage's tensors, or a copy fetched from a peer."""

    def __init__(self, name: str, files: Sequence[TensorFile]) -> None:
        self.name = name
        self._files = {tensor: file for file in files for tensor in file.tensors}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name."""
        return {name: file.tensors[name] for name, file in self._files.items()}

    def read(self, name: str, offset: int, count: int) -> bytes:
        """Part of a tensor's data; see TensorFile."""
        return self._files[name].read(name, offset, count)


def write_copy(path: Path, source: Replica) -> None:
    """Write a replica's weights as they are. Raises OSError or ValueError."""
    tensors = source.tensors

    def data(name: str) -> Iterator[bytes]:
        block = _BLOCK_ELEMENTS * ELEMENT_BYTES[tensors[name].dtype]
        for offset in range(0, tensors[name].num_bytes, block):
            yield source.read(name, offset, block)

    write_tensors(path, [(name, info.dtype, info.shape) for name, info in tensors.items()], data)


def write_mean(path: Path, replicas: Sequence[Replica]) -> None:
    """Write the mean of all replicas, summed in float64 in the order of their names.

    So every participant gets the same bits. Half-precision weights give a float32 mean. Raises OSError, or ValueError
    naming the replica whose tensors differ from the first one's.
    """
    ordered = sorted(replicas, key=lambda replica: replica.name)
    tensors = ordered[0].tensors
    for replica in ordered[1:]:
        _check_same(ordered[0], replica)
    outputs = [(name, "F64" if info.dtype == "F64" else "F32", info.shape) for name, info in tensors.items()]

    def data(name: str) -> Iterator[bytes]:
        info = tensors[name]
        element = ELEMENT_BYTES[info.dtype]
        dtype = np.dtype("<f8" if info.dtype == "F64" else "<f4")
        for offset in range(0, info.num_bytes, _BLOCK_ELEMENTS * element):
            blocks = (_floats(info.dtype, replica.read(name, offset, _BLOCK_ELEMENTS * element)) for replica in ordered)
            total = next(blocks).astype(np.float64)
            for block in blocks:
                total += block
            total /= len(ordered)
            yield total.astype(dtype).tobytes()

    write_tensors(path, outputs, data)


def _check_same(first: Replica, other: Replica) -> None:
    mine, theirs = first.tensors, other.tensors
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs:
            raise ValueError(f"{name} is in the weights of only one of {first.name} and {other.name}")
        if (mine[name].dtype, mine[name].shape) != (theirs[name].dtype, theirs[name].shape):
            raise ValueError(f"{name} differs in type or shape between {first.name} and {other.name}")


def _floats(dtype: str, data: bytes) -> npt.NDArray[Any]:
    """Elements as numbers. numpy has no bfloat16: its bits are the upper half of a float32."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << np.uint32(16)).view("<f4")
    return np.frombuffer(data, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype])
