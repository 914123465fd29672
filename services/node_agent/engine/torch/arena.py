"""Nameless shared memory files: what stage workers exchange tensors through. Needs no torch."""

import os
import sys
import tempfile

#: Address space of an arena. Pages are only taken when written, and low addresses are used first.
ARENA_BYTES = 1 << 31
#: Device memory of a stage whose outputs stay on the device; what does not fit goes through its arena. The headers of
#: its blocks lie behind the arena, in pages that are only taken when written.
DEVICE_ARENA_BYTES = 1 << 28


def create_arena(arena_bytes: int = ARENA_BYTES, device_bytes: int = DEVICE_ARENA_BYTES) -> int:
    """File descriptor of a nameless shared memory file; the caller closes it."""
    if sys.platform == "linux":
        fd = os.memfd_create("lemix-arena", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, arena_bytes + device_bytes)
    return fd
