"""The log of the core's events: what a replay needs, and what a researcher reads."""

import json
import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog

from services.scheduler import metrics
from services.scheduler.core.codec import command_to_json, config_to_json, event_to_json
from services.scheduler.core.types import Command, CoreConfig, Event

_log = structlog.get_logger()

_Entry = tuple[float, Event, Sequence[Command]]
#: Entries between the driver and the writing thread.
_MAX_BUFFERED = 65_536


class EventLog:
    """Appends JSON lines from a thread of its own: first {"config"}, then {"now_s", "event", "commands"} per event.

    Never delays the driver. Is the disk too slow or full, entries are left out and counted; such a log cannot be
    replayed, and its "dropped" lines say so.
    """

    def __init__(self, path: Path, config: CoreConfig) -> None:
        """Raises OSError when the file cannot be opened."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._queue: queue.Queue[_Entry | None] = queue.Queue(_MAX_BUFFERED)
        self._num_dropped = 0
        self._failed = False
        self._write({"config": config_to_json(config)})
        self._thread = threading.Thread(target=self._run, name="event-log", daemon=True)
        self._thread.start()

    def add(self, now_s: float, event: Event, commands: Sequence[Command]) -> None:
        """Note one step of the core."""
        try:
            self._queue.put_nowait((now_s, event, commands))
        except queue.Full:
            self._num_dropped += 1
            metrics.DROPPED_LOG_LINES.inc()

    def close(self) -> None:
        """Write what is buffered and close the file; idempotent."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
            try:
                self._file.close()
            except OSError as error:
                self._fail(error)

    def _run(self) -> None:
        while True:
            entry = self._queue.get()
            if entry is None:
                return
            now_s, event, commands = entry
            commands_json = [command_to_json(command) for command in commands]
            self._write({"now_s": now_s, "event": event_to_json(event), "commands": commands_json})
            if self._num_dropped:
                dropped, self._num_dropped = self._num_dropped, 0
                self._write({"dropped": dropped})
            if self._queue.empty():
                self._flush()

    def _write(self, line: dict[str, Any]) -> None:
        if self._failed:
            metrics.DROPPED_LOG_LINES.inc()
            return
        try:
            self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
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
