"""Device memory for machines without a device: a file of its own, which others open by a name that is sent to them."""

import mmap
import os

from services.node_agent.engine.torch.arena import create_arena
from services.node_agent.engine.torch.memory import HostMemory


class FileMemory(HostMemory):
    """Implements OwnDeviceMemory."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        super().__init__(mmap.mmap(fd, num_bytes))
        self._fd = fd
        self.export = f"/proc/{os.getpid()}/fd/{fd}".encode()

    def close(self) -> None:
        """See Memory."""
        super().close()
        os.close(self._fd)


class FileMemories:
    """Implements DeviceMemories."""

    def create(self, num_bytes: int) -> FileMemory:
        """See DeviceMemories."""
        return FileMemory(create_arena(num_bytes, 0), num_bytes)

    def open(self, export: bytes, num_bytes: int) -> FileMemory:
        """See DeviceMemories."""
        return FileMemory(os.open(export, os.O_RDWR), num_bytes)
