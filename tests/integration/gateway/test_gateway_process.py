"""The gateway as a process: starting, refusing to start, stopping."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.integration.gateway.fakes import FakeNode, FakeScheduler, Script
from tests.unit.gateway.model_files import write_model

_ROOT = Path(__file__).resolve().parents[3]


async def _start(*settings: str) -> asyncio.subprocess.Process:
    arguments = [part for setting in settings for part in ("--set", setting)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LEMIX_")}
    environment["PYTHONPATH"] = f"{_ROOT}:{_ROOT / 'sdk'}"
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.gateway", *arguments, stderr=asyncio.subprocess.PIPE, cwd=_ROOT, env=environment
    )


async def _wait_listening(process: asyncio.subprocess.Process) -> str:
    """The REST address from the log line."""
    assert process.stderr is not None
    async with asyncio.timeout(20):
        while line := (await process.stderr.readline()).decode():
            if "listening" in line:
                return next(word.removeprefix("http=") for word in line.split() if word.startswith("http="))
    raise AssertionError("the gateway ended without listening")


@pytest.fixture
async def scheduler() -> AsyncIterator[FakeScheduler]:
    node = FakeNode("node-0")
    await node.start()
    scheduler = FakeScheduler(node)
    await scheduler.start()
    yield scheduler
    await scheduler.stop()
    await node.stop()


async def test_a_stopping_gateway_finishes_what_runs(scheduler: FakeScheduler, tmp_path: Path) -> None:
    script = scheduler.script = Script(hold_after=2)
    process = await _start(
        f"scheduler_address={scheduler.address}", f"model_path={write_model(tmp_path / 'm')}", "listen=127.0.0.1:0",
        "http_listen=127.0.0.1:0",
    )  # fmt: skip
    try:
        address = await _wait_listening(process)
        async with httpx.AsyncClient(base_url=f"http://{address}", timeout=20, trust_env=False) as http:
            async with asyncio.timeout(10):
                while (await http.get("/readyz")).status_code != 200:  # each answer asks the scheduler: no busy loop
                    pass
            call = asyncio.create_task(http.post("/v1/completions", json={"model": "m", "prompt": "abc"}))
            async with asyncio.timeout(5):
                await scheduler.submits.get()
            process.send_signal(signal.SIGTERM)
            script.go.set()
            assert (await call).json()["choices"][0]["text"] == "hello world"
        async with asyncio.timeout(15):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("setting", ["http_listen", "listen"])
async def test_a_taken_port_is_one_line_and_exit_code_1(setting: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        other = {"http_listen": "listen", "listen": "http_listen"}[setting]
        process = await _start(
            "scheduler_address=127.0.0.1:1", f"model_path={model}", f"{setting}={address}", f"{other}=127.0.0.1:0"
        )
        async with asyncio.timeout(30):
            _, error = await process.communicate()
    assert process.returncode == 1
    assert f"cannot listen on {address}" in error.decode()
    assert "Traceback" not in error.decode()


async def test_a_missing_model_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    process = await _start("scheduler_address=127.0.0.1:1", f"model_path={tmp_path}", "listen=127.0.0.1:0")
    async with asyncio.timeout(30):
        _, error = await process.communicate()
    assert process.returncode == 1
    assert error.decode().strip().endswith("config.json: No such file or directory")


async def test_the_gateway_process_imports_no_torch() -> None:
    code = "import sys, services.gateway.__main__; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=_ROOT)
    async with asyncio.timeout(30):
        assert await process.wait() == 0
