"""The client: open loop, and every way an answer can end."""

import asyncio
import json
import time

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from bench.live.client import Answer, Client
from bench.live.plan_file import read_plan, read_records, write_plan, write_records
from bench.live.requests import PlannedRequest, RequestRecord, Status

_REPORT = {
    "node_id": "node-1",
    "weight_versions": [{"node_id": "node-1", "incarnation": 2, "step": step} for step in (7, 8)],
    "staleness_s": 0.5,
    "reference_loss": 2.25,
}


def _planned(index, at_s=0.0, tokens=2):
    return PlannedRequest(f"r{index}", at_s, "prompt", "reference", tokens, "docs")


def _record():
    return RequestRecord("r0", "docs", 1.0, 1.001, Status.UNFINISHED)


def _events(*texts, tokens=None):
    chunks = [{"choices": [{"text": text}]} for text in texts]
    chunks.append({"choices": [{"text": "", "finish_reason": "length"}]})
    chunks.append({"choices": [], "usage": {"completion_tokens": tokens or len(texts)}, "lemix": _REPORT})
    return [f"data: {json.dumps(chunk)}".encode() for chunk in chunks] + [b"data: [DONE]"]


def _answer(lines):
    answer = Answer()
    for index, line in enumerate(lines):
        answer.take(line, 2.0 + index)
    return answer


def test_a_whole_answer():
    record = _answer([b"", b": ping", *_events("a", "b", "c")]).finish(_record(), 3)
    assert record.status is Status.OK
    # The chunk with the finish reason counts: the last tokens may have had no text of their own.
    assert (record.first_token_s, record.last_token_s) == (4.0, 7.0)
    assert record.output_tokens == 3
    assert record.tpot_s == 1.5
    assert (record.node_id, record.weight_steps) == ("node-1", (7, 8))
    assert (record.staleness_s, record.reference_loss) == (0.5, 2.25)
    assert record.error == ""


def test_an_answer_shorter_than_planned_failed():
    record = _answer(_events("a", "b")).finish(_record(), 3)
    assert record.status is Status.FAILED
    assert "2 tokens instead of 3" in record.error


def test_a_stream_that_breaks_off_failed():
    record = _answer(_events("a", "b")[:-1]).finish(_record(), 2)
    assert record.status is Status.FAILED
    assert record.error == "the stream ended early"


def test_an_error_inside_the_stream_failed_even_if_done_follows():
    lines = [b'data: {"error": {"code": "node_lost", "message": "gone"}}', b"data: [DONE]"]
    record = _answer(lines).finish(_record(), 2)
    assert record.status is Status.FAILED
    assert "node_lost" in record.error


@pytest.mark.parametrize(
    ("code", "status"), [(429, Status.REJECTED), (503, Status.REJECTED), (400, Status.FAILED), (500, Status.FAILED)]
)
def test_refusals(code, status):
    answer = Answer()
    answer.refused(code, "busy")
    record = answer.finish(_record(), 2)
    assert record.status is status
    assert record.error == f"HTTP {code}: busy"


def _stream(*lines):
    return web.Response(body=b"\n".join(lines), content_type="text/event-stream")


async def _run(handler, requests, patience_s=5.0):
    app = web.Application()
    app.router.add_post("/v1/completions", handler)
    async with TestServer(app) as server, aiohttp.ClientSession(server.make_url("/")) as http:
        client = Client(http, "demo", time.monotonic())
        return await client.run(requests, patience_s), client.progress


async def test_requests_carry_the_plan():
    bodies = []

    async def handler(request):
        bodies.append(await request.json())
        return _stream(*_events("a", "b"))

    records, progress = await _run(handler, [_planned(0)])
    assert records[0].status is Status.OK
    assert bodies[0]["prompt"] == "prompt"
    assert bodies[0]["max_tokens"] == 2
    assert bodies[0]["ignore_eos"] is True
    assert bodies[0]["lemix"] == {"reference": "reference", "request_id": "r0"}
    assert (progress.sent, progress.ok, progress.bad) == (1, 1, 0)


async def test_open_loop_sends_all_before_the_first_answer():
    arrived, all_there = 0, asyncio.Event()

    async def handler(_request):
        nonlocal arrived
        arrived += 1
        if arrived == 5:
            all_there.set()
        await all_there.wait()  # a closed loop would wait here for ever
        return _stream(*_events("a", "b"))

    records, _ = await _run(handler, [_planned(index, 0.001 * index) for index in range(5)])
    assert [record.status for record in records] == [Status.OK] * 5


async def test_what_never_ends_is_unfinished():
    async def handler(_request):
        await asyncio.Event().wait()
        raise AssertionError

    records, progress = await _run(handler, [_planned(0)], patience_s=0.05)
    assert records[0].status is Status.UNFINISHED
    assert records[0].error
    assert progress.bad == 1


async def test_a_refusal_comes_with_its_body():
    async def handler(_request):
        return web.json_response({"error": {"code": "overloaded"}}, status=429)

    records, _ = await _run(handler, [_planned(0)])
    assert records[0].status is Status.REJECTED
    assert "overloaded" in records[0].error


async def test_a_broken_connection_failed():
    async def handler(request):
        request.transport.abort()
        return web.Response()

    records, _ = await _run(handler, [_planned(0)])
    assert records[0].status is Status.FAILED
    assert "ServerDisconnectedError" in records[0].error


async def test_a_stream_that_is_no_json_failed():
    async def handler(_request):
        return _stream(b"data: {half")

    records, _ = await _run(handler, [_planned(0)])
    assert records[0].status is Status.FAILED
    assert "JSONDecodeError" in records[0].error


async def test_nothing_to_send():
    async def handler(_request):
        raise AssertionError

    records, _ = await _run(handler, [])
    assert records == []


def test_plans_and_records_survive_their_files(tmp_path):
    requests = [_planned(0), _planned(1, 0.5)]
    write_plan(tmp_path / "plan", url="http://server", model="demo", drain_s=3.0, requests=requests)
    assert read_plan(tmp_path / "plan") == ({"url": "http://server", "model": "demo", "drain_s": 3.0}, requests)
    records = [_answer(_events("a", "b")).finish(_record(), 2), _record()]
    write_records(tmp_path / "records", records)
    assert read_records(tmp_path / "records") == records
