"""The compose file, the configuration files and the Dockerfile fit together and fit the services."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.compose_check import problems_of
from deploy.settings_check import load_container_settings, settings_class
from services.runtime.config import ConfigError, load_settings

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
COMPOSE = DEPLOY / "docker-compose.yml"
SERVICES = ("gateway", "node_agent", "profiler", "scheduler")


def test_the_compose_file_is_right():
    assert problems_of(COMPOSE) == []


def test_only_the_gateway_is_reachable_and_on_loopback_only():
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert {name for name, service in services.items() if "ports" in service} == {"gateway"}
    assert all(port.startswith("127.0.0.1:") for port in services["gateway"]["ports"])


def test_every_service_has_a_configuration_file_it_accepts():
    assert {path.stem for path in (DEPLOY / "config").glob("*.yaml")} == set(SERVICES)
    for service in SERVICES:
        path = DEPLOY / "config" / f"{service}.yaml"
        load_settings(settings_class(service), service, ["--config", str(path)], {})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c.update(servces={}), "unknown top-level key servces"),
        (lambda c: c["services"]["gateway"].update(port="8000"), "service gateway: unknown key port"),
        (lambda c: c["services"]["redis"].pop("image"), "service redis: neither image nor build"),
        (lambda c: c["services"]["redis"].pop("healthcheck"), "waits for the health of redis"),
        (lambda c: c["services"].pop("profiler"), "service scheduler: depends on profiler"),
        (lambda c: c["services"]["redis"].update(networks=["other"]), "network other is not declared"),
        (lambda c: c["volumes"].pop("ledger"), "volume ledger is not declared"),
        (lambda c: c["services"]["gateway"]["build"].update(target="web"), "no target web"),
        (lambda c: c["services"]["gateway"]["build"].update(args={"NOPE": "1"}), "no ARG NOPE"),
        (lambda c: c["services"]["gateway"]["build"].update(dockerfile="x"), "no Dockerfile at"),
        (lambda c: c["services"]["node-0"]["environment"].update(LEMIX_NODE_AGENT_NODEID="x"), "nodeid: unknown key"),
        (
            lambda c: c["services"]["node-0"]["environment"].update(LEMIX_GATEWAY_LISTEN="x"),
            "no setting of this service",
        ),
        (lambda c: c["services"]["node-0"].update(command=["python", "-m", "services.nodes"]), "no such service"),
        (lambda c: c["services"]["node-0"].update(command=["sh", "-c", "true"]), "not python -m services"),
        (
            lambda c: c["services"]["scheduler"]["depends_on"].update(redis={"condition": "soon"}),
            "unknown condition soon",
        ),
    ],
)
def test_each_kind_of_mistake_is_found(tmp_path, change, problem):
    document = yaml.safe_load(COMPOSE.read_text())
    for service in document["services"].values():
        if "build" in service:
            service["build"] = {**service["build"], "context": str(DEPLOY.parent)}
    change(document)
    path = tmp_path / "compose.yml"
    path.write_text(yaml.safe_dump(document))
    assert any(problem in found for found in problems_of(path)), problems_of(path)


@pytest.mark.parametrize("text", ["", "[]", "a: [", "services: 3"])
def test_what_is_no_compose_file_is_refused(tmp_path, text):
    path = tmp_path / "compose.yml"
    path.write_text(text)
    assert len(problems_of(path)) == 1


def test_a_service_without_settings_is_refused():
    with pytest.raises(ConfigError, match="no such service"):
        settings_class("nonsense")
    with pytest.raises(ConfigError, match="unknown key"):
        load_container_settings(["python", "-m", "services.profiler", "--set", "nonsense=1"], {})


def test_the_dockerfile_needs_no_frontend_and_runs_unprivileged():
    text = (DEPLOY / "Dockerfile").read_text()
    assert "# syntax=" not in text
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", text, re.MULTILINE | re.DOTALL))
    assert "USER lemix" in stages["runtime"]
    assert "HEALTHCHECK" in stages["runtime"]
    for target in ("control", "node"):
        assert f"FROM runtime AS {target}" in text
        assert "USER root" not in stages[target]
    assert "torch" not in stages["build-control"]


def test_a_real_compose_agrees():
    binary = shutil.which("docker-compose")
    if binary is None:
        pytest.skip("no docker-compose on this machine")
    done = subprocess.run([binary, "-f", str(COMPOSE), "config", "-q"], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
