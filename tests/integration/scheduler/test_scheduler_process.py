"""The scheduler as a process: what it says of settings it cannot use."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("core.max_waiting_training=0", "core.max_waiting_training must be at least 1, got 0"),
        ("core.hold_s=-1", "core.hold_s must not be negative, got -1.0"),
        ("core.policy=fastest", "core.policy: unknown policy 'fastest'; known: "),
        ("core.policy_options={speed: 1}", "core.policy_options: policy 'lemix' has no option 'speed'; known: "),
        ("core.policy=[]", "core.policy: Input should be a valid string"),
    ],
)
async def test_a_value_that_the_core_refuses_is_one_line_and_exit_code_2(setting: str, message: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LEMIX_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.scheduler", "--set", setting,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT,
        env={**environment, "PYTHONPATH": f"{ROOT}:{ROOT / 'sdk'}"},
    )  # fmt: skip
    async with asyncio.timeout(60.0):
        output, errors = await process.communicate()
    line = errors.decode()
    assert (process.returncode, output) == (2, b"")
    assert line.startswith(f"scheduler: {message}")
    assert line.endswith("\n")
    assert line.count("\n") == 1
