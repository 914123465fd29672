"""Checks a compose file without a compose binary: `python -m deploy.compose_check FILE`.

The essentials of the compose specification (names resolve, conditions can be met, keys are known), and that every LeMix
service accepts the settings it would get.
"""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from deploy.settings_check import load_container_settings
from services.runtime.config import ConfigError

_TOP_LEVEL = {"name", "services", "networks", "volumes"}
_SERVICE_KEYS = {
    "build", "cap_drop", "command", "depends_on", "environment", "healthcheck", "image", "init", "networks", "ports",
    "read_only", "restart", "security_opt", "shm_size", "stop_grace_period", "tmpfs", "volumes",
}  # fmt: skip
_CONDITIONS = {"service_started", "service_healthy", "service_completed_successfully"}
_VARIABLE = re.compile(r"\$\{([A-Z_][A-Z0-9_]*)(?::?-([^}]*))?\}")


def problems_of(path: Path) -> list[str]:
    """Everything wrong with a compose file, one sentence each; empty: nothing."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        return [f"{path}: {error}"]
    if not isinstance(document, dict) or not isinstance(document.get("services"), dict):
        return [f"{path}: no services"]
    document = _interpolate(document)
    unknown = {key for key in document if not str(key).startswith("x-")} - _TOP_LEVEL
    found = [f"unknown top-level key {key}" for key in sorted(unknown)]
    checks: list[Callable[[str, dict[str, Any], dict[str, Any]], list[str]]] = [
        _check_keys, _check_dependencies, _check_names, _check_build, _check_settings,
    ]  # fmt: skip
    for name, service in document["services"].items():
        for check in checks:
            found.extend(f"service {name}: {problem}" for problem in check(str(path.parent), service, document))
    return found


def _interpolate(value: Any) -> Any:
    """Replace ${NAME:-default} by its default: what a user without any variable gets."""
    if isinstance(value, dict):
        return {key: _interpolate(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_interpolate(item) for item in value]
    return _VARIABLE.sub(lambda match: match[2] or "", value) if isinstance(value, str) else value


def _check_keys(_: str, service: dict[str, Any], __: dict[str, Any]) -> list[str]:
    found = [f"unknown key {key}" for key in sorted(set(service) - _SERVICE_KEYS)]
    if not service.get("image") and not service.get("build"):
        found.append("neither image nor build")
    if "healthcheck" in service and not service["healthcheck"].get("test"):
        found.append("health check without a test")
    return found


def _check_dependencies(_: str, service: dict[str, Any], document: dict[str, Any]) -> list[str]:
    found = []
    for target, terms in service.get("depends_on", {}).items():
        other = document["services"].get(target)
        if other is None:
            found.append(f"depends on {target}, which is no service")
        elif terms.get("condition") not in _CONDITIONS:
            found.append(f"waits for {target} under the unknown condition {terms.get('condition')}")
        elif terms["condition"] == "service_healthy" and "healthcheck" not in other:
            found.append(f"waits for the health of {target}, which has no health check")
    return found


def _check_names(_: str, service: dict[str, Any], document: dict[str, Any]) -> list[str]:
    found = [
        f"network {name} is not declared" for name in service.get("networks", []) if name not in document["networks"]
    ]
    for volume in service.get("volumes", []):
        source = str(volume).split(":", 1)[0]
        if not source.startswith((".", "/", "~")) and source not in document.get("volumes", {}):
            found.append(f"volume {source} is not declared")
    return found


def _check_build(folder: str, service: dict[str, Any], _: dict[str, Any]) -> list[str]:
    build = service.get("build")
    if build is None:
        return []
    dockerfile = Path(folder) / build["context"] / build["dockerfile"]
    if not dockerfile.is_file():
        return [f"no Dockerfile at {dockerfile}"]
    text = dockerfile.read_text(encoding="utf-8")
    targets = set(re.findall(r"^FROM\s+\S+\s+AS\s+(\S+)", text, re.MULTILINE))
    arguments = set(re.findall(r"^ARG\s+(\w+)", text, re.MULTILINE))
    found = [] if build["target"] in targets else [f"the Dockerfile has no target {build['target']}"]
    return found + [f"the Dockerfile has no ARG {key}" for key in build.get("args", {}) if key not in arguments]


def _check_settings(_: str, service: dict[str, Any], __: dict[str, Any]) -> list[str]:
    if "build" not in service:
        return []
    environment: Mapping[str, Any] = service.get("environment", {})
    try:
        load_container_settings(service["command"], {key: str(value) for key, value in environment.items()})
    except ConfigError as error:
        return [str(error)]
    return []


if __name__ == "__main__":
    problems = [problem for name in sys.argv[1:] for problem in problems_of(Path(name))]
    for line in problems:
        sys.stderr.write(f"{line}\n")
    sys.exit(1 if problems else 0)
