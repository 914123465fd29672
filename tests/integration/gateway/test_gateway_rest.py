"""REST generation, end to end over loopback."""

import asyncio
import json

from tests.integration.gateway.conftest import MODEL, Gateway
from tests.integration.gateway.fakes import Script

VERSIONS = [{"job_id": "job-7", "node_id": "node-0", "incarnation": 1, "step": 235}]


async def test_completion(gateway: Gateway) -> None:
    answer = await gateway.http.post(
        "/v1/completions",
        json={"model": MODEL, "prompt": "abc", "temperature": 0, "lemix": {"reference": "xyz"}},
        headers={"x-request-id": "r-1", "x-slo-ttft-ms": "250", "x-session-id": "s"},
    )
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["id"] == "cmpl-r-1"
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "hello world", "finish_reason": "stop", "logprobs": None}]
    work = gateway.scheduler.submitted[0][1]
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": len(Script().tokens(99)),
        "total_tokens": 3 + len(Script().tokens(99)),
    }
    assert body["lemix"].pop("ttft_s") > 0
    assert body["lemix"] == {
        "node_id": "node-0", "weight_versions": VERSIONS, "staleness_s": 0.5, "reference_loss": 1.25,
    }  # fmt: skip
    assert answer.headers["x-request-id"] == "r-1"
    assert list(work.prompt_token_ids) == [ord(c) for c in "abc"]
    assert list(work.reference_token_ids) == [ord(c) for c in "xyz"]
    assert (work.slo.ttft_s, work.slo.HasField("tpot_s"), work.session_id) == (0.25, False, "s")
    assert (work.sampling.max_tokens, work.sampling.temperature) == (16, 0.0)
    assert work.deadline_unix_s - work.arrival_unix_s == 300


async def test_chat_stream_has_openai_chunks(gateway: Gateway) -> None:
    body = {
        "model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    async with gateway.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in answer.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    assert text == "hello world"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-2]["lemix"]["weight_versions"] == VERSIONS
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(Script().tokens(99))
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_stop_string_over_token_borders_cancels_the_request(gateway: Gateway) -> None:
    gateway.scheduler.script = Script(text="one END two three", hold_after=9)
    answer = await gateway.http.post(
        "/v1/completions", json={"model": MODEL, "prompt": "x", "max_tokens": 50, "stop": [" END"]}
    )
    body = answer.json()
    assert body["choices"][0]["text"] == "one"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 7
    assert body["lemix"]["weight_versions"] == VERSIONS
    async with asyncio.timeout(5):
        assert await gateway.scheduler.cancels.get() == body["id"].removeprefix("cmpl-")


async def test_streamed_characters_are_whole(gateway: Gateway) -> None:
    gateway.scheduler.script = Script(text="aé€😀b")
    body = {"model": MODEL, "prompt": "x", "max_tokens": 50, "stream": True}
    async with gateway.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = [line async for line in answer.aiter_lines() if line and line != "data: [DONE]"]
    texts = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines]
    assert "".join(texts) == "aé€😀b"
    assert not any("�" in text for text in texts)
    assert len(texts) > 2


async def test_length_is_told(gateway: Gateway) -> None:
    answer = await gateway.http.post("/v1/completions", json={"model": MODEL, "prompt": [1, 2], "max_tokens": 3})
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    assert answer.json()["usage"]["completion_tokens"] == 3


async def test_chat_without_a_limit_gets_the_rest_of_the_context(gateway: Gateway) -> None:
    answer = await gateway.http.post(
        "/v1/chat/completions", json={"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    )
    work = gateway.scheduler.submitted[0][1]
    assert answer.json()["choices"][0]["message"]["content"] == "hello world"
    assert work.sampling.max_tokens == 256 - len(work.prompt_token_ids)


async def test_a_repeated_request_id_returns_the_stored_result(gateway: Gateway) -> None:
    body = {"model": MODEL, "prompt": "abc", "lemix": {"request_id": "same"}}
    first = (await gateway.http.post("/v1/completions", json=body)).json()
    second = (await gateway.http.post("/v1/completions", json=body)).json()
    assert first["choices"] == second["choices"]
    assert first["usage"] == second["usage"]
    assert [request_id for request_id, _ in gateway.scheduler.submitted] == ["same", "same"]


async def test_models_health_and_metrics(gateway: Gateway) -> None:
    models = (await gateway.http.get("/v1/models")).json()
    assert [model["id"] for model in models["data"]] == [MODEL]
    assert (await gateway.http.get(f"/v1/models/{MODEL}")).json()["max_model_len"] == 256
    assert (await gateway.http.get("/v1/models/other/one")).status_code == 404
    assert (await gateway.http.get("/healthz")).status_code == 200
    assert (await gateway.http.get("/readyz")).status_code == 200
    gateway.scheduler.ready = False
    answer = await gateway.http.get("/readyz")
    assert (answer.status_code, answer.json()["reason"]) == (503, "no node is ready")
    await gateway.scheduler.stop()
    answer = await gateway.http.get("/readyz")
    assert (answer.status_code, answer.json()["reason"]) == (503, "the scheduler is not reachable right now")
    assert (await gateway.http.get("/healthz")).status_code == 200
    metrics = (await gateway.http.get("/metrics")).text
    assert 'lemix_gateway_http_requests_total{route="healthz",status="200"}' in metrics
