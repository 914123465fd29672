"""Typed settings: defaults, then a YAML file, then the environment, then `--set`; an unknown key is an error.

A service `scheduler` reads `LEMIX_SCHEDULER_<KEY>`, `__` separating levels (`LEMIX_SCHEDULER_CORE__POLICY=lemix`), and
the shared `LEMIX_REDIS_URL` where it has a `redis_url`.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

#: Environment variables that every service may find set and that are no key of any one service.
SHARED_ENVIRONMENT = {"LEMIX_REDIS_URL": "redis_url"}


class ConfigError(ValueError):
    """A setting is unknown or unusable. The message names the key and where it came from."""


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys refused, defaults validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class LogSettings(Settings):
    """How a service logs."""

    #: "debug", "info", "warning" or "error".
    level: str = "info"
    #: "console" for people, "json" for machines.
    format: str = "console"


class ServiceSettings(Settings):
    """Settings every service has."""

    #: host:port of the gRPC server; port 0 picks a free one.
    listen: str = "127.0.0.1:0"
    log: LogSettings = LogSettings()
    #: Port of the Prometheus endpoint on 127.0.0.1; 0: none.
    metrics_port: int = 0
    #: Seconds a stopping service lets running calls finish.
    shutdown_grace_s: float = 5.0


T = TypeVar("T", bound=Settings)


def load_settings(cls: type[T], service: str, argv: Sequence[str], environment: Mapping[str, str]) -> T:
    """Settings of a service from its command line and environment.

    Raises ConfigError naming the key and its source.
    """
    parser = argparse.ArgumentParser(prog=f"python -m services.{service}")
    parser.add_argument("--config", type=Path, help="YAML file with settings")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    arguments = parser.parse_args(argv)
    values: dict[str, Any] = {}
    if arguments.config is not None:
        _merge(values, _read_yaml(arguments.config))
    for key, (path, text) in _environment_keys(cls, service, environment).items():
        _put(values, path, _scalar(text), f"environment variable {key}")
    for assignment in arguments.set:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"--set {assignment}: write KEY=VALUE")
        _put(values, key.split("."), _scalar(text), f"--set {key}")
    return validate(cls, values)


def validate(cls: type[T], values: Mapping[str, Any]) -> T:
    """Settings from a plain mapping. Raises ConfigError listing every bad key."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or '(settings)'}: {_explain(item['type'], item['msg'])}"
            for item in error.errors()
        )
        raise ConfigError(problems) from error


def _explain(kind: str, message: str) -> str:
    return "unknown key" if kind == "extra_forbidden" else message


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: the top level must be a mapping")
    return content


def _environment_keys(
    cls: type[Settings], service: str, environment: Mapping[str, str]
) -> dict[str, tuple[list[str], str]]:
    prefix = f"LEMIX_{service.upper()}_"
    found = {
        name: ([part.lower() for part in name[len(prefix) :].split("__")], text)
        for name, text in sorted(environment.items())
        if name.startswith(prefix)
    }
    for name, key in SHARED_ENVIRONMENT.items():
        if name in environment and key in cls.model_fields:
            found[name] = ([key], environment[name])
    return found


def _scalar(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _put(values: dict[str, Any], path: Sequence[str], value: Any, source: str) -> None:
    for part in path[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: {part} is not a group of settings")
    values[path[-1]] = value


def _merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
