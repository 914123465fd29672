"""`make up` as a person runs it: ready, Ctrl-C, nothing left; and nothing left when it is killed by force."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
from cluster_under_test import eventually

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def up(model, profiles, tmp_path):
    """The command, started; whatever it leaves is killed at the end."""
    (tmp_path / "profiles").symlink_to(profiles)
    command = [sys.executable, "-m", "deploy.local", "--model", str(model), "--nodes", "1", "--port", "0"]
    with subprocess.Popen(
        [*command, "--grpc-port", "0", "--directory", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'sdk'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        family = []
        process.family = family
        yield process
        for member in [*family, *([psutil.Process(process.pid)] if process.poll() is None else [])]:
            if member.is_running():
                member.kill()


def read_until(process, text):
    """The launcher's output up to a line that holds some text."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


def alive(processes):
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left(up, number):
    text = read_until(up, "Ctrl-C stops everything")
    url = re.search(r"REST\s+(\S+)", text)[1]
    assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
    assert f"curl {url}/v1/chat/completions" in text
    up.family += psutil.Process(up.pid).children(recursive=True)
    assert len(up.family) >= 6  # Redis, profiler, scheduler, node agent, stage worker, gateway
    up.send_signal(number)
    assert up.wait(30) == (0 if number == signal.SIGINT else -signal.SIGKILL)
    eventually(lambda: not alive(up.family), "every process has ended")


def test_a_service_that_dies_is_reported_and_stops_the_cluster(up):
    read_until(up, "Ctrl-C stops everything")
    up.family += psutil.Process(up.pid).children(recursive=True)
    (scheduler,) = [p for p in up.family if "services.scheduler" in p.cmdline()]
    scheduler.kill()
    assert "scheduler ended with exit code -9" in up.stdout.read()
    assert up.wait(30) == 1
    assert alive(up.family) == []
