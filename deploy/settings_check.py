"""Finds the settings class of a service and loads a container's settings through it."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from services.runtime.config import ConfigError, ServiceSettings, load_settings

ROOT = Path(__file__).resolve().parents[1]

#: Where the repository lies in an image.
IMAGE_ROOT = "/app/"


def settings_class(service: str) -> type[ServiceSettings]:
    """The settings class of `services.<service>`. Raises ConfigError when there is no such service."""
    try:
        module = importlib.import_module(f"services.{service}.config")
    except ModuleNotFoundError as error:
        raise ConfigError(f"services.{service}: no such service") from error
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, ServiceSettings) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise ConfigError(f"services.{service}.config: expected one class of settings, found {len(found)}")
    return found[0]


def load_container_settings(command: Sequence[str], environment: Mapping[str, str]) -> ServiceSettings:
    """Settings of a container that runs `python -m services.<name> ARGS`, with its environment.

    Raises ConfigError for an unknown service, file or key, and for a LEMIX_ variable that belongs to no setting.
    """
    if list(command[:2]) != ["python", "-m"] or not command[2].startswith("services."):
        raise ConfigError(f"{' '.join(command)}: not python -m services.<name>")
    service = command[2].removeprefix("services.")
    cls = settings_class(service)
    for name in environment:
        shared = name == "LEMIX_REDIS_URL" and "redis_url" in cls.model_fields
        if name.startswith("LEMIX_") and not name.startswith(f"LEMIX_{service.upper()}_") and not shared:
            raise ConfigError(f"{service}: {name} is no setting of this service")
    arguments = [text.replace(IMAGE_ROOT, f"{ROOT}/", 1) for text in command[3:]]
    return load_settings(cls, service, arguments, environment)
