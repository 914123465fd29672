"""The log of the core's events: what a replay needs, and what a researcher reads."""

import json
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import structlog

from services.scheduler import metrics
from services.scheduler.core.codec import command_to_json, config_to_json, event_to_json
from services.scheduler.core.commands import Command
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import Event

_log = structlog.get_logger()

#: Form of the log. A reader refuses a log of another version.
VERSION: Final = 1

_Entry = tuple[float, Event, Sequence[Command]]
#: Entries between the driver and the writing thread.
_MAX_BUFFERED: Final = 65_536
#: Pause of the writing thread, seconds: one wake-up serves many entries, and this much is lost in a crash.
_WRITE_INTERVAL_S: Final = 0.25

_encode = json.JSONEncoder(separators=(",", ":")).encode


class EventLog:
    """Appends JSON lines from a thread of its own: {"version", "config"}, then {"now_s", "event", "commands"} each.

    Never delays the driver. Is the disk too slow or full, entries are left out and counted; such a log cannot be
    replayed, and its "dropped" lines say so.
    """

    def __init__(self, path: Path, config: CoreConfig) -> None:
        """Raises OSError when the file cannot be opened."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        #: Appended to by the driver and emptied by the thread; both ends of a deque are safe without a lock.
        self._entries: deque[_Entry] = deque()
        self._num_dropped = 0
        #: How many of them "dropped" lines tell of.
        self._num_told = 0
        self._failed = False
        self._closing = threading.Event()
        self._write({"version": VERSION, "config": config_to_json(config)})
        self._thread = threading.Thread(target=self._run, name="event-log", daemon=True)
        self._thread.start()

    def add(self, now_s: float, event: Event, commands: Sequence[Command]) -> None:
        """Note one step of the core."""
        if len(self._entries) < _MAX_BUFFERED:
            self._entries.append((now_s, event, commands))
        else:
            self._num_dropped += 1
            metrics.DROPPED_LOG_LINES.inc()

    def close(self) -> None:
        """Write what is buffered and close the file; idempotent."""
        if self._thread.is_alive():
            self._closing.set()
            self._thread.join()
            try:
                self._file.close()
            except OSError as error:
                self._fail(error)

    def _run(self) -> None:
        while not self._closing.wait(_WRITE_INTERVAL_S):
            self._write_entries()
        self._write_entries()

    def _write_entries(self) -> None:
        num_entries, num_dropped = len(self._entries), self._num_dropped
        for _ in range(num_entries):
            now_s, event, commands = self._entries.popleft()
            commands_json = [command_to_json(command) for command in commands]
            self._write({"now_s": now_s, "event": event_to_json(event), "commands": commands_json})
        if num_dropped > self._num_told:
            self._write({"dropped": num_dropped - self._num_told})
            self._num_told = num_dropped
        if num_entries:
            self._flush()

    def _write(self, line: dict[str, Any]) -> None:
        if self._failed:
            metrics.DROPPED_LOG_LINES.inc()
            return
        try:
            self._file.write(_encode(line) + "\n")
        except OSError as error:
            self._fail(error)

    def _flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            _log.error("event log stopped", path=self._file.name, error=str(error))
