"""Reads event logs (`event_log.py`): one run of a scheduler per configuration line, restarts append."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from services.scheduler.core.codec import command_from_json, config_from_json, event_from_json
from services.scheduler.core.commands import Command
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import Event
from services.scheduler.event_log import VERSION

_T = TypeVar("_T")

#: No clock shows more, seconds.
_LATEST_S = 1e18


class LogError(ValueError):
    """The log cannot be used; the message is one line that names file, line and field."""


@dataclass(frozen=True, slots=True)
class RunBegan:
    """A scheduler started with this configuration; a fresh core takes the steps that follow."""

    line: int
    config: CoreConfig


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the core."""

    line: int
    now_s: float
    event: Event
    commands: list[Command]


@dataclass(frozen=True, slots=True)
class Dropped:
    """Steps that were not written, because the disk was too slow."""

    line: int
    count: int


Entry = RunBegan | Step | Dropped


def read_log(path: Path) -> Iterator[Entry]:
    """Entries in order, the first of them a RunBegan. Raises LogError.

    A last line without its end is still being written, and left out.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise LogError(f"{path}: {error.strerror}") from error
    with file:
        line = 0
        for line, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                line -= 1
                break
            entry = _entry(path, line, raw)
            if line == 1 and not isinstance(entry, RunBegan):
                raise LogError(f"{path}: line 1: field 'config' is missing: not the start of an event log")
            yield entry
        if line == 0:
            raise LogError(f"{path}: line 1: nothing there")


def _entry(path: Path, line: int, raw: bytes) -> Entry:
    place = f"{path}: line {line}"
    try:
        data = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise LogError(f"{place}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise LogError(f"{place}: expected an object with 'config', 'event' or 'dropped'")
    if "config" in data:
        return _run_began(place, line, data)
    if "dropped" in data:
        return Dropped(line, _field(place, data, "dropped", _count))
    return Step(
        line,
        _field(place, data, "now_s", _finite),
        _field(place, data, "event", _object(event_from_json)),
        _field(place, data, "commands", _commands),
    )


def _run_began(place: str, line: int, data: Mapping[str, Any]) -> RunBegan:
    # Version 1 was not written down at first.
    version = data.get("version", VERSION)
    if version != VERSION:
        raise LogError(f"{place}: field 'version' is {version!r}; this program reads version {VERSION}")
    return RunBegan(line, _field(place, data, "config", _object(config_from_json)))


def _field(place: str, data: Mapping[str, Any], name: str, decode: Callable[[Any], _T]) -> _T:
    if name not in data:
        raise LogError(f"{place}: field {name!r} is missing")
    try:
        return decode(data[name])
    except ValueError as error:
        raise LogError(f"{place}: field {name!r}: {error}") from error


def _object(decode: Callable[[Mapping[str, Any]], _T]) -> Callable[[Any], _T]:
    def decode_object(value: Any) -> _T:
        if not isinstance(value, dict):
            raise ValueError(f"expected an object, got {value!r}")
        return decode(value)

    return decode_object


def _commands(value: Any) -> list[Command]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list, got {value!r}")
    decode = _object(command_from_json)
    return [decode(item) for item in value]


def _finite(value: Any) -> float:
    # As a comparison: it is false for NaN, and a whole number may be too large for a float.
    if not isinstance(value, float | int) or isinstance(value, bool) or not -_LATEST_S < value < _LATEST_S:
        raise ValueError(f"expected a time in seconds, got {value!r}")
    return float(value)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"expected a number of steps, got {value!r}")
    return value
