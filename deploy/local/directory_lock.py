"""One cluster per run directory: two would write the same ledger, logs and settings."""

import fcntl
import os
from pathlib import Path
from typing import Final

_NAME: Final = ".lock"


class DirectoryInUseError(RuntimeError):
    """Another process holds the directory."""


class DirectoryLock:
    """Held from construction to `release`, or to the end of the process, however it ends.

    The directory is made if there is none. Raises DirectoryInUseError, OSError when it cannot be made or written.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._descriptor: int | None = os.open(directory / _NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise DirectoryInUseError(f"{directory} is in use") from error

    def release(self) -> None:
        """Let others have the directory; idempotent. The file stays: removing it could let two hold one."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
