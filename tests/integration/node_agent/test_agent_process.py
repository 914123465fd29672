"""The agent as a process: how it starts, refuses to start, stops and dies."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from lemix.internal.v1 import node_agent_service_pb2 as node_pb2
from lemix.internal.v1 import node_agent_service_pb2_grpc as node_grpc
from services.runtime.grpc_client import open_channel
from tests.integration.node_agent.harness import write_model
from tests.parity.tiny import write_tiny_llama

TIMEOUT_S = 60.0
ROOT = Path(__file__).parents[3]


@contextlib.asynccontextmanager
async def _agent(**settings: object) -> AsyncIterator[asyncio.subprocess.Process]:
    arguments = [argument for key, value in settings.items() for argument in ("--set", f"{key}={value}")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LEMIX_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.node_agent",
        *arguments,
        cwd=ROOT,
        env={**environment, "PYTHONPATH": f"{ROOT}:{ROOT / 'sdk'}"},
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        process._transport.close()  # else its pipes outlive the loop when a grandchild still holds them


async def _address(process: asyncio.subprocess.Process) -> str:
    """host:port from the line every service prints."""
    assert process.stderr is not None
    async with asyncio.timeout(TIMEOUT_S):
        while line := (await process.stderr.readline()).decode():
            found = re.search(r"listening\W.*address=(\S+)", re.sub(r"\x1b\[[0-9;]*m", "", line))
            if found:
                return found.group(1)
    raise AssertionError(f"the agent ended with {process.returncode} instead of listening")


async def _end(process: asyncio.subprocess.Process) -> tuple[int, str]:
    async with asyncio.timeout(TIMEOUT_S):
        _, stderr = await process.communicate()
    assert process.returncode is not None
    return process.returncode, stderr.decode()


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        ({"engine": "emulated", "model_path": "/nowhere"}, 1, r"cannot load the model /nowhere: .*config\.json"),
        ({"model_path": "/nowhere"}, 1, "cannot load the model /nowhere: "),
        ({"redis_url": "redis://127.0.0.1:1/0"}, 1, r"redis://127\.0\.0\.1:1/0"),
        ({"redis_url": "postgres://there"}, 1, "a ledger URL starts with"),
        ({"emulated_latency": "{guess: {form: constant}}"}, 1, "guess"),
        ({"num_stages": 0}, 2, "num_stages"),
        ({"colour": "red"}, 2, "colour: unknown key"),
    ],
)
async def test_a_start_that_cannot_work_is_one_line(
    tmp_path: Path, settings: dict[str, object], code: int, message: str
) -> None:
    model = write_model(tmp_path / "model")
    defaults: dict[str, object] = {"engine": "emulated", "model_path": model, "redis_url": "memory://none"}
    if "engine" not in settings and settings.get("model_path"):
        del defaults["engine"]
    async with _agent(**{**defaults, **settings}) as process:
        returned, stderr = await _end(process)
    assert returned == code, stderr
    assert re.search(message, stderr)
    assert "Traceback" not in stderr
    assert len([line for line in stderr.splitlines() if line.startswith("node_agent: ")]) == 1


async def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        model = write_model(tmp_path / "model")
        async with _agent(engine="emulated", model_path=model, redis_url="memory://none", listen=listen) as process:
            returned, stderr = await _end(process)
    assert returned == 1
    assert f"node_agent: cannot listen on {listen}" in stderr


async def test_sigterm_stops_cleanly_without_a_scheduler(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    async with _agent(engine="emulated", model_path=model, redis_url="memory://none") as process:
        async with open_channel(await _address(process)) as channel:
            info = await node_grpc.NodeAgentServiceStub(channel).GetNodeInfo(node_pb2.GetNodeInfoRequest())
        assert info.model == "model"
        process.terminate()
        returned, stderr = await _end(process)
    assert returned == 0, stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_no_stage_worker_outlives_the_agent(tmp_path: Path, number: signal.Signals) -> None:
    model = write_tiny_llama(tmp_path / "llama")
    async with _agent(model_path=model, redis_url="memory://none", num_stages=2) as process:
        async with open_channel(await _address(process)) as channel:
            info = await node_grpc.NodeAgentServiceStub(channel).GetNodeInfo(node_pb2.GetNodeInfoRequest())
        workers = [psutil.Process(pid) for pid in info.worker_pids]
        assert len(workers) == 2
        process.send_signal(number)
        returned, _ = await _end(process)
        assert returned == (0 if number is signal.SIGTERM else -signal.SIGKILL)
        _, alive = await asyncio.to_thread(psutil.wait_procs, workers, timeout=TIMEOUT_S)
        assert alive == []


async def test_a_dead_worker_ends_the_agent_with_exit_code_1(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "llama")
    async with _agent(model_path=model, redis_url="memory://none", num_stages=2) as process:
        async with open_channel(await _address(process)) as channel:
            stub = node_grpc.NodeAgentServiceStub(channel)
            info = await stub.GetNodeInfo(node_pb2.GetNodeInfoRequest())
            os.kill(info.worker_pids[1], signal.SIGKILL)
        returned, stderr = await _end(process)
    assert returned == 1
    assert "the node cannot go on: " in stderr
    assert "stage 1 worker" in stderr
