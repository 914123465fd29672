"""Events, commands and the configuration as JSON objects, for the event log and its replay.

An object of a union (events, commands, tasks) carries its class name under "type"; fields keep their names; an enum
is its value; a tuple is a list. Times and durations keep every bit: JSON numbers are written shortest-round-trip.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from operator import attrgetter
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from services.scheduler.core.commands import Command
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import Event

_TYPE = "type"


def event_to_json(event: Event) -> dict[str, Any]:
    """JSON object of an event."""
    return _tagged(event)


def event_from_json(data: Mapping[str, Any]) -> Event:
    """Event of a JSON object.

    Raises ValueError naming the field for an unknown type, or a field that is missing, unknown or of the wrong kind.
    """
    event: Event = _decode(Event, data)
    return event


def command_to_json(command: Command) -> dict[str, Any]:
    """JSON object of a command."""
    return _tagged(command)


def command_from_json(data: Mapping[str, Any]) -> Command:
    """Command of a JSON object. Raises ValueError like `event_from_json`."""
    command: Command = _decode(Command, data)
    return command


def config_to_json(config: CoreConfig) -> dict[str, Any]:
    """JSON object of a configuration: the first line of an event log, without which it cannot be replayed."""
    return _encode_object(config)


def config_from_json(data: Mapping[str, Any]) -> CoreConfig:
    """Configuration of a JSON object. Raises ValueError like `event_from_json`."""
    config: CoreConfig = _decode(CoreConfig, data)
    return config


_hints = cache(get_type_hints)


def _tagged(value: object) -> dict[str, Any]:
    return {_TYPE: type(value).__name__, **_encode_object(value)}


def _encode_object(value: object) -> dict[str, Any]:
    cls: Any = type(value)  # mypy takes no class for hashable
    names, nested = _encoders(cls)
    encoded = {name: getattr(value, name) for name in names}
    for name, encode in nested:
        encoded[name] = encode(encoded[name])
    return encoded


@cache
def _encoders(cls: type) -> tuple[tuple[str, ...], tuple[tuple[str, Callable[[Any], Any]], ...]]:
    """Names of a class's fields, and how to encode those whose values are not JSON already; built once per class."""
    names = tuple(_fields(cls))
    encoders = ((name, _encoder(_hints(cls)[name])) for name in names)
    return names, tuple((name, encode) for name, encode in encoders if encode is not None)


@cache
def _encoder(hint: Any) -> Callable[[Any], Any] | None:
    """Function that turns a value of the given type into JSON; None: it is JSON already. Built once per type."""
    if _is_union(hint):
        return _union_encoder(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple:
        encode_item = _encoder(arguments[0])
        return list if encode_item is None else lambda value: [encode_item(item) for item in value]
    if origin is not None and issubclass(origin, Mapping):
        encode_key, encode_value = (_encoder(argument) or _same for argument in arguments)
        return lambda value: {encode_key(key): encode_value(item) for key, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return attrgetter("_value_")  # unlike `value` no call of Python code
    return _encode_object if _is_record(hint) else None


def _union_encoder(hint: Any) -> Callable[[Any], Any] | None:
    classes = _classes(hint)
    if len(classes) > 1:
        return _tagged
    encoders = [encode for option in get_args(hint) if (encode := _encoder(option)) is not None]
    if not encoders:
        return None
    if len(get_args(hint)) > 2 or NoneType not in get_args(hint):
        raise TypeError(f"no JSON form for {hint}")
    return lambda value: None if value is None else encoders[0](value)


def _same(value: Any) -> Any:
    return value


def _classes(hint: Any) -> dict[str, type]:
    """Records a union offers, by name."""
    options = get_args(hint) if _is_union(hint) else ()
    return {option.__name__: option for option in options if _is_record(option)}


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def _is_record(hint: Any) -> bool:
    """Whether a type is a dataclass or a named tuple."""
    return isinstance(hint, type) and (is_dataclass(hint) or hasattr(hint, "_field_defaults"))


def _fields(cls: Any) -> dict[str, bool]:
    """Fields of a record, and whether each has to be given."""
    if is_dataclass(cls):
        known = [field for field in fields(cls) if field.init]
        return {field.name: field.default is MISSING and field.default_factory is MISSING for field in known}
    return {name: name not in cls._field_defaults for name in cls._fields}


def _decode(hint: Any, data: Any) -> Any:
    return _decoder(hint)(data)


@cache
def _decoder(hint: Any) -> Callable[[Any], Any]:
    """Function that turns JSON into a value of the given type; built once per type."""
    if _is_union(hint):
        return _union_decoder(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple:
        return lambda data: tuple(_decode(arguments[0], item) for item in _expect(list, data))
    if origin is not None and issubclass(origin, Mapping):
        return lambda data: {
            _decode(arguments[0], key): _decode(arguments[1], item) for key, item in _expect(dict, data).items()
        }
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint
    if _is_record(hint):
        return lambda data: _build(hint, _expect(dict, data))
    if hint is float:
        return lambda data: _expect((float, int), data)
    return lambda data: _expect(hint, data)


def _union_decoder(hint: Any) -> Callable[[Any], Any]:
    classes = _classes(hint)
    if classes and NoneType not in get_args(hint):

        def by_tag(data: Any) -> Any:
            name = _expect(dict, data).get(_TYPE)
            if not isinstance(name, str) or name not in classes:
                raise ValueError(f"unknown type {name!r}; known: {', '.join(sorted(classes))}")
            return _build(classes[name], {key: item for key, item in data.items() if key != _TYPE})

        return by_tag
    options = [option for option in get_args(hint) if option is not NoneType]
    if len(options) == 1:
        return lambda data: None if data is None else _decode(options[0], data)
    kinds = get_args(hint)
    return lambda data: _expect(kinds, data)


def _build(cls: Any, data: Mapping[str, Any]) -> Any:
    hints = _hints(cls)
    known = _fields(cls)
    for name in data:
        if name not in known:
            raise ValueError(f"{cls.__name__} has no field {name!r}")
    for name, is_required in known.items():
        if is_required and name not in data:
            raise ValueError(f"{cls.__name__} lacks the field {name!r}")
    values = {}
    for name, item in data.items():
        try:
            values[name] = _decode(hints[name], item)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return cls(**values)


def _expect(kind: Any, data: Any) -> Any:
    """The value itself, if it is of that kind; bool is no number."""
    numeric = kind is int or kind == (float, int)
    if not isinstance(data, kind) or (numeric and isinstance(data, bool)):
        names = " or ".join(option.__name__ for option in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"expected {names}, got {data!r}")
    return data
