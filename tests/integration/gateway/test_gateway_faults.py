"""Lost clients, lost sessions, lost nodes, deadlines, overload."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.types import Receive

from lemix.errors import ErrorCode, LemixError
from services.gateway import http_app, http_body
from services.gateway.types import GenerationRequest, Sampling
from tests.integration.gateway.conftest import MODEL, Gateway, eventually
from tests.integration.gateway.fakes import FakeNode, FakeScheduler, Script

_TOO_MANY = b"HTTP/1.1 429 Too Many Requests\r\n"
_BODY = {"model": MODEL, "prompt": "abc", "lemix": {"request_id": "r"}}


@pytest.fixture
def overrides() -> dict[str, Any]:
    return {"limits": {"max_concurrent_requests": 2}}


async def _cancelled(gateway: Gateway) -> str:
    async with asyncio.timeout(5):
        return await gateway.scheduler.cancels.get()


async def test_a_client_that_leaves_before_the_answer_frees_the_request(gateway: Gateway) -> None:
    gateway.scheduler.script = Script(hold_after=1)
    call = asyncio.create_task(gateway.http.post("/v1/completions", json=_BODY))
    await gateway.scheduler.submits.get()
    call.cancel()
    assert await _cancelled(gateway) == "r"
    await eventually(lambda: gateway.application.link.num_pending == 0)


async def test_a_client_that_leaves_a_stream_frees_the_request(gateway: Gateway) -> None:
    gateway.scheduler.script = Script(hold_after=2)
    async with gateway.http.stream("POST", "/v1/completions", json={**_BODY, "stream": True}) as answer:
        async for line in answer.aiter_lines():
            assert line.startswith("data: ")
            break
    assert await _cancelled(gateway) == "r"
    await eventually(lambda: gateway.application.link.num_pending == 0)


async def test_a_cancel_that_was_lost_with_its_session_is_told_again(gateway: Gateway) -> None:
    gateway.scheduler.script = Script(hold_after=1)
    gateway.scheduler.deaf = True
    call = asyncio.create_task(gateway.http.post("/v1/completions", json=_BODY))
    await gateway.scheduler.submits.get()
    call.cancel()
    assert await asyncio.wait_for(gateway.scheduler.lost_cancels.get(), 5) == "r"
    gateway.scheduler.deaf = False
    gateway.scheduler.drop_session()
    assert await _cancelled(gateway) == "r"


async def test_a_lost_session_is_opened_again_and_requests_survive(gateway: Gateway) -> None:
    gateway.scheduler.hold = True
    call = asyncio.create_task(gateway.http.post("/v1/completions", json=_BODY))
    await gateway.scheduler.submits.get()
    gateway.scheduler.hold = False
    gateway.scheduler.node.begin("r", gateway.scheduler.submitted[0][1], gateway.scheduler.script)
    gateway.scheduler.drop_session()
    answer = await call
    assert answer.json()["choices"][0]["text"] == "hello world"
    assert [request_id for request_id, _ in gateway.scheduler.submitted] == ["r", "r"]
    assert gateway.scheduler.num_sessions == 2


async def test_a_retry_that_meets_its_own_cancellation_runs_anew(gateway: Gateway) -> None:
    """The first attempt's client left, and its cancellation ends what the second one was attached to."""
    first = gateway.scheduler.script = Script(hold_after=4)
    call = asyncio.create_task(gateway.http.post("/v1/completions", json=_BODY))
    await eventually(lambda: _received(gateway) == 4)
    gateway.node.cancel("r")
    await eventually(lambda: len(gateway.scheduler.submitted) == 1)
    outcome = gateway.node.outcome("r")
    assert outcome is not None
    gateway.scheduler.finish("r", outcome)  # not by this gateway's wish
    gateway.node.forget("r")
    await eventually(lambda: len(gateway.scheduler.submitted) == 2)
    first.go.set()
    gateway.node.begin("r", gateway.scheduler.submitted[1][1], Script())
    gateway.scheduler.assign("r", gateway.node)
    answer = await call
    assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, "hello world")


async def test_an_accepted_request_goes_on_while_the_scheduler_cannot_say_where_it_stands(gateway: Gateway) -> None:
    script = gateway.scheduler.script = Script(hold_after=4)
    call = asyncio.create_task(gateway.http.post("/v1/completions", json=_BODY))
    await eventually(lambda: _received(gateway) == 4)
    gateway.scheduler.reject = LemixError(ErrorCode.UNAVAILABLE, "the ledger is away", retry_after_s=0.01)
    gateway.scheduler.drop_session()
    await eventually(lambda: len(gateway.scheduler.submitted) >= 3)
    other = await gateway.http.post("/v1/completions", json={**_BODY, "lemix": {"request_id": "new"}})
    assert (other.status_code, other.json()["error"]["code"]) == (503, "unavailable"), "this one was never accepted"
    script.go.set()
    assert (await call).json()["choices"][0]["text"] == "hello world"


async def test_a_restarted_scheduler_is_found_again(gateway: Gateway) -> None:
    address = gateway.scheduler.address
    await gateway.scheduler.stop()
    await eventually(lambda: not gateway.application.link.connected)
    answer = await gateway.http.post("/v1/completions", json=_BODY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert answer.headers["retry-after"] == "1"
    again = FakeScheduler(gateway.node)
    await again.start(address)
    try:
        async with asyncio.timeout(10):
            await gateway.application.link.wait_connected()
        assert (await gateway.http.post("/v1/completions", json=_BODY)).status_code == 200
    finally:
        await again.stop()


async def test_a_broken_token_stream_goes_on_where_it_was(gateway: Gateway) -> None:
    script = gateway.scheduler.script = Script(hold_after=4)
    call = asyncio.create_task(gateway.http.post("/v1/completions", json=_BODY))
    await eventually(lambda: bool(gateway.node.attached))
    await eventually(lambda: _received(gateway) == 4)
    address = gateway.node.address
    await gateway.node.stop()
    script.go.set()
    await gateway.node.start(address)
    assert (await call).json()["choices"][0]["text"] == "hello world"
    assert gateway.node.attached == [("r", 0), ("r", 4)]


async def test_a_reassigned_request_delivers_only_what_lies_beyond(gateway: Gateway) -> None:
    gateway.scheduler.script = Script(hold_after=4)
    call = asyncio.create_task(gateway.http.post("/v1/completions", json=_BODY))
    await eventually(lambda: _received(gateway) == 4)
    other = FakeNode("node-1")
    await other.start()
    try:
        other.begin("r", gateway.scheduler.submitted[0][1], Script())
        gateway.scheduler.assign("r", other)
        body = (await call).json()
    finally:
        await other.stop()
    assert body["choices"][0]["text"] == "hello world"
    assert body["lemix"]["node_id"] == "node-1"
    assert other.attached == [("r", 4)]


async def test_a_node_error_reaches_the_client(gateway: Gateway) -> None:
    gateway.scheduler.script = Script(error=LemixError(ErrorCode.RESOURCE_EXHAUSTED, "needs 9 blocks, 4 exist"))
    answer = await gateway.http.post("/v1/completions", json=_BODY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "resource_exhausted")
    body = {**_BODY, "stream": True, "lemix": {"request_id": "r2"}}
    async with gateway.http.stream("POST", "/v1/completions", json=body) as stream:
        lines = [line async for line in stream.aiter_lines() if line]
    assert '"code":"resource_exhausted"' in lines[-1]


async def test_more_requests_than_the_bound_get_429(gateway: Gateway) -> None:
    script = gateway.scheduler.script = Script(hold_after=1)
    calls = [
        asyncio.create_task(gateway.http.post("/v1/completions", json={"model": MODEL, "prompt": "abc"}))
        for _ in range(2)
    ]
    await eventually(lambda: gateway.application.link.num_pending == 2)
    answer = await gateway.http.post("/v1/completions", json=_BODY)
    assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
    assert answer.headers["retry-after"] == "1"
    script.go.set()
    assert [(await call).status_code for call in calls] == [200, 200]
    assert (await gateway.http.post("/v1/completions", json=_BODY)).status_code == 200


class TestMoreConnectionsThanTheBound:
    @pytest.fixture
    def overrides(self) -> dict[str, Any]:
        return {"limits": {"max_concurrent_requests": 1, "spare_http_requests": 0}}

    async def test_get_an_error_object_whatever_they_ask(self, gateway: Gateway) -> None:
        call = await self._fill(gateway)
        answer = await gateway.http.get("/v1/models")
        assert answer.status_code == 429
        assert (answer.headers["retry-after"], answer.headers["connection"]) == ("1", "close")
        assert answer.headers["x-request-id"]
        assert answer.json()["error"]["code"] == "overloaded"
        assert answer.json()["error"]["type"] == "rate_limit_error"
        await self._end(gateway, call)
        assert (await gateway.http.get("/v1/models")).status_code == 200

    async def test_get_it_after_sending_a_large_body(self, gateway: Gateway) -> None:
        call = await self._fill(gateway)
        async with _posting(gateway, content_length=8_000_000) as (reader, writer):
            for _ in range(8):
                writer.write(b"x" * 1_000_000)
                await writer.drain()
            assert await reader.readline() == _TOO_MANY
        await self._end(gateway, call)

    async def test_hold_no_place_while_their_bodies_are_thrown_away(
        self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(http_body, "_DISCARD_TIMEOUT_S", 1000.0)
        discards = _count_discards(monkeypatch)
        call = await self._fill(gateway)
        async with _posting(gateway, content_length=8_000_000) as (reader, writer):
            await eventually(lambda: len(discards) == 1)
            await self._end(gateway, call)
            assert (await gateway.http.get("/v1/models")).status_code == 200
            writer.write(b"x" * 8_000_000)
            assert await reader.readline() == _TOO_MANY

    async def test_get_it_at_once_when_many_bodies_are_thrown_away_already(
        self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(http_body, "_DISCARD_TIMEOUT_S", 1000.0)
        monkeypatch.setattr(http_app, "_MAX_DISCARDS", 1)
        discards = _count_discards(monkeypatch)
        call = await self._fill(gateway)
        async with _posting(gateway, content_length=10):
            await eventually(lambda: len(discards) == 1)
            async with _posting(gateway, content_length=10) as (reader, _):
                assert await reader.readline() == _TOO_MANY
        await self._end(gateway, call)

    async def test_are_not_asked_for_a_body_they_have_not_begun(
        self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(http_body, "_DISCARD_TIMEOUT_S", 1000.0)
        call = await self._fill(gateway)
        async with _posting(gateway, content_length=10, more="expect: 100-continue\r\n") as (reader, _):
            assert await reader.readline() == _TOO_MANY
        await self._end(gateway, call)

    async def _fill(self, gateway: Gateway) -> asyncio.Task[httpx.Response]:
        gateway.scheduler.script = Script(hold_after=1)
        call = asyncio.create_task(gateway.http.post("/v1/completions", json=_BODY))
        await gateway.scheduler.submits.get()
        return call

    async def _end(self, gateway: Gateway, call: asyncio.Task[httpx.Response]) -> None:
        call.cancel()
        assert await _cancelled(gateway) == "r"
        await eventually(lambda: gateway.application.link.num_pending == 0)


async def test_an_id_in_flight_is_a_conflict(gateway: Gateway) -> None:
    script = gateway.scheduler.script = Script(hold_after=1)
    call = asyncio.create_task(gateway.http.post("/v1/completions", json=_BODY))
    await gateway.scheduler.submits.get()
    answer = await gateway.http.post("/v1/completions", json=_BODY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
    script.go.set()
    assert (await call).status_code == 200


class TestDeadline:
    """A gateway that gives up soon."""

    @pytest.fixture
    def overrides(self) -> dict[str, Any]:
        return {"request_timeout_s": 0.3}

    async def test_deadline_cancels_and_tells(self, gateway: Gateway) -> None:
        gateway.scheduler.script = Script(hold_after=3)
        answer = await gateway.http.post("/v1/completions", json=_BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert await _cancelled(gateway) == "r"
        assert gateway.application.link.num_pending == 0

    async def test_a_request_may_ask_for_less(self, gateway: Gateway) -> None:
        gateway.scheduler.script = Script(hold_after=0)
        request = GenerationRequest(prompt="abc", sampling=Sampling(max_tokens=4), timeout_s=0.05)
        with pytest.raises(LemixError) as raised:
            await gateway.application.generation.generate(request)
        assert raised.value.code is ErrorCode.DEADLINE_EXCEEDED
        assert "0.05" in raised.value.message


async def test_draining_answers_readyz_with_503(gateway: Gateway) -> None:
    gateway.readiness.draining = True
    answer = await gateway.http.get("/readyz")
    assert (answer.status_code, answer.json()["reason"]) == (503, "the gateway is stopping")


async def test_many_requests_share_one_stream_per_node(gateway: Gateway) -> None:
    async def one(http: httpx.AsyncClient) -> str:
        answer = await http.post("/v1/completions", json={"model": MODEL, "prompt": "abc"})
        return str(answer.json()["choices"][0]["text"])

    for _ in range(4):
        assert await asyncio.gather(one(gateway.http), one(gateway.http)) == ["hello world"] * 2
    assert len(gateway.application.streams._streams) == 1
    await gateway.node.stop()  # a node that is gone and that nobody waits for is forgotten
    await eventually(lambda: not gateway.application.streams._streams)


@asynccontextmanager
async def _posting(
    gateway: Gateway, *, content_length: int, more: str = ""
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection on which the head of a request was sent."""
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {content_length}\r\n{more}\r\n"
    writer.write(head.encode())
    try:
        async with asyncio.timeout(10):
            yield reader, writer
    finally:
        writer.close()


def _count_discards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each body whose throwing away begins."""
    found: list[int] = []
    discard = http_body.discard

    async def counted(receive: Receive, limit: int) -> None:
        found.append(limit)
        await discard(receive, limit)

    monkeypatch.setattr(http_app, "discard", counted)
    return found


def _received(gateway: Gateway) -> int:
    pending = list(gateway.application.link._pending.values())
    return pending[0].num_received if pending else 0
