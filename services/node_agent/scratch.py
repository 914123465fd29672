"""Folders for files that must not outlive the node, however it ends."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

_PREFIX = "lemix-scratch-"
#: A folder without an owner may be one that is just being made.
_YOUNG_S = 60.0


class ScratchFolder:
    """A new folder under the system's temporary one; removed by `remove`, or by a later node when its owner was killed.

    Its owner holds a lock on it, which ends with the process: unlike a process id it cannot be mistaken for another's,
    nor does it matter whether the processes see each other.
    """

    def __init__(self, kind: str) -> None:
        remove_abandoned()
        self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{kind}-"))
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Remove the folder and what is in it. To be called once."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_abandoned() -> None:
    """Remove this user's scratch folders whose owners are gone."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        # Another node may be removing it at the same time.
        with contextlib.suppress(OSError):
            _remove_if_abandoned(path)


def _remove_if_abandoned(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(folder)
        if status.st_uid == os.getuid() and time.time() - status.st_mtime > _YOUNG_S:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
    finally:
        os.close(folder)
