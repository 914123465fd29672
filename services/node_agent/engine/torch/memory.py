"""Memory that one stage worker writes and others read: on the host, or on a device."""

import contextlib
import mmap
from typing import Protocol

import torch
from torch import Tensor


class Memory(Protocol):
    """The memory of one stage, as one process sees it."""

    @property
    def device(self) -> torch.device:
        """Where it is."""
        ...

    @property
    def address(self) -> int:
        """Where it begins in this process."""
        ...

    def tensor(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """`count` elements from byte `start` on, as they lie."""
        ...

    def borrow(self, start: int, count: int, dtype: torch.dtype) -> tuple[Tensor, object]:
        """The same, and an object that lives as long as anything refers to the elements: this tensor, another one with
        its storage, or a graph."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class OwnDeviceMemory(Memory, Protocol):
    """Made by this process, for others to open."""

    @property
    def export(self) -> bytes:
        """What another process needs to open it."""
        ...


class DeviceMemories(Protocol):
    """How the processes of one kind of device share memory."""

    def create(self, num_bytes: int) -> OwnDeviceMemory:
        """Raises OSError or RuntimeError."""
        ...

    def open(self, export: bytes, num_bytes: int) -> Memory:
        """What another process exported. Raises OSError or RuntimeError."""
        ...


class HostMemory:
    """A shared memory file."""

    device = torch.device("cpu")

    def __init__(self, file: mmap.mmap) -> None:
        self._file = file
        self.address = torch.frombuffer(file, dtype=torch.uint8, count=1).data_ptr()

    def tensor(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """See Memory."""
        return torch.frombuffer(self._file, dtype=dtype, count=count, offset=start)

    def borrow(self, start: int, count: int, dtype: torch.dtype) -> tuple[Tensor, object]:
        """See Memory."""
        # The tensor's storage, and whatever shares it, keeps the view alive, and nothing else does.
        block = memoryview(self._file)[start : start + count * dtype.itemsize]
        return torch.frombuffer(block, dtype=dtype, count=count), block

    def close(self) -> None:
        """See Memory."""
        # What was taken and is still in use keeps the file mapped.
        with contextlib.suppress(BufferError):
            self._file.close()
