"""The client as a process of its own, against a small server on loopback."""

import asyncio
import json
import socket
import time
from contextlib import asynccontextmanager

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from bench.live.client_process import ClientProcess
from bench.live.errors import LiveError
from bench.live.plan_file import write_plan
from bench.live.requests import PlannedRequest, Status


async def _completions(request):
    tokens = (await request.json())["max_tokens"]

    def events():
        for _ in range(tokens):
            yield f"data: {json.dumps({'choices': [{'text': 'x'}]})}\n\n"
        yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': tokens}})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


@asynccontextmanager
async def _server():
    async def models(_request):
        return JSONResponse({"data": []})

    app = Starlette(routes=[Route("/v1/completions", _completions, methods=["POST"]), Route("/v1/models", models)])
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", lifespan="off"))
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


def _plan(tmp_path, url):
    requests = [PlannedRequest(f"r{index}", 0.01 * index, "prompt", "true", 3, "docs") for index in range(4)]
    write_plan(tmp_path / "plan.jsonl", url=url, model="demo", drain_s=10.0, requests=requests)
    return ClientProcess(tmp_path / "plan.jsonl")


async def test_a_plan_is_sent_and_recorded(tmp_path):
    counts = {}
    async with _server() as url:
        client = _plan(tmp_path, url)
        await client.start()
        assert client.pid > 0
        records = await client.run(time.monotonic(), counts.update)
        await client.stop()
    assert [record.status for record in records] == [Status.OK] * 4
    assert [record.output_tokens for record in records] == [3] * 4
    assert all(record.first_token_s <= record.last_token_s for record in records)
    assert counts["sent"] <= 4


async def test_a_server_that_is_not_there_is_told_with_the_log(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        client = _plan(tmp_path, f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(LiveError, match=r"could not start.*ClientConnectorError"):
            await client.start()
        await client.stop()


async def test_stop_ends_a_client_that_waits(tmp_path):
    async with _server() as url:
        client = _plan(tmp_path, url)
        await client.start()
        await client.stop()
        with pytest.raises(LiveError, match="exit code"):
            await client.run(time.monotonic(), lambda counts: None)
