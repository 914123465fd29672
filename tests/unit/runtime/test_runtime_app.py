"""The frame of a service: exit codes and one-line messages. Real processes, since it owns signals and exits."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import asyncio
from services.runtime.app import StartupError, run
from services.runtime.config import ConfigError, ServiceSettings

class Example(ServiceSettings):
    fail: str = ""

async def main(settings, stop):
    if settings.fail == "startup":
        raise StartupError("cannot reach the store at redis://x")
    if settings.fail == "setting":
        raise ConfigError("fail: cannot be judged before")
    if settings.fail == "bug":
        raise RuntimeError("oops")
    print("up", flush=True)
    await stop.wait()
    print("closed", flush=True)

run("example", Example, main)
"""


def start(*arguments):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'sdk'}"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_in_order(number):
    with start() as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "closed\n")
    assert "stopped" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--set", "fail=startup"], 1, "example: cannot reach the store at redis://x\n"),
        (["--set", "fail=setting"], 2, "example: fail: cannot be judged before\n"),
        (["--set", "nonsense=1"], 2, "example: nonsense: unknown key\n"),
        (["--set", "log.level=loud"], 2, "example: log.level: 'loud' is not one of debug, info, warning, error\n"),
        (["--set", "log.format=xml"], 2, "example: log.format: 'xml' is not one of console, json\n"),
    ],
)
def test_what_an_operator_can_mend_is_one_line(arguments, code, message):
    with start(*arguments) as process:
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (code, "", message)


def test_a_bug_is_a_traceback():
    with start("--set", "fail=bug") as process:
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "Traceback" in err
    assert "RuntimeError: oops" in err
