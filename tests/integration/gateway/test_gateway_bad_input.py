"""Whatever a client sends wrong, it gets an OpenAI-shaped answer with a stable code."""

import json
from typing import Any

import pytest

from lemix.errors import ErrorCode, LemixError
from tests.integration.gateway.conftest import MODEL, Gateway

_OK: dict[str, Any] = {"model": MODEL, "prompt": "abc"}
_CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def overrides() -> dict[str, Any]:
    return {"limits": {"max_body_bytes": 20_000}}


def _problem(body: dict[str, Any]) -> tuple[str, str | None]:
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] in ("invalid_request_error", "server_error", "rate_limit_error")
    return error["code"], error["param"]


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"prompt": ""}, 400, "invalid_request", "prompt"),
        ({"prompt": []}, 400, "invalid_request", "prompt"),
        ({"prompt": 5}, 400, "invalid_request", "prompt"),
        ({"prompt": [1, 262]}, 400, "invalid_request", "prompt"),
        ({"prompt": [-1]}, 400, "invalid_request", "prompt"),
        ({"prompt": ["a", "b"]}, 400, "unsupported", "prompt"),
        ({"prompt": "\ud800"}, 400, "invalid_json", None),
        ({"prompt": "x" * 256}, 400, "context_length_exceeded", "prompt"),
        ({"prompt": "x" * 15_000}, 400, "context_length_exceeded", "prompt"),
        ({"max_tokens": 254}, 400, "context_length_exceeded", "max_tokens"),
        ({"max_tokens": 0}, 400, "invalid_request", "max_tokens"),
        ({"max_tokens": -3}, 400, "invalid_request", "max_tokens"),
        ({"max_tokens": 10**12}, 400, "invalid_request", "max_tokens"),
        ({"max_tokens": "5"}, 400, "invalid_request", "max_tokens"),
        ({"max_tokens": True}, 400, "invalid_request", "max_tokens"),
        ({"temperature": 2.5}, 400, "invalid_request", "temperature"),
        ({"temperature": "hot"}, 400, "invalid_request", "temperature"),
        ({"top_p": 0}, 400, "invalid_request", "top_p"),
        ({"top_k": -5}, 400, "invalid_request", "top_k"),
        ({"stop": ["a"] * 5}, 400, "invalid_request", "stop"),
        ({"stop": ""}, 400, "invalid_request", "stop"),
        ({"stop": [1]}, 400, "invalid_request", "stop"),
        ({"stream": "yes"}, 400, "invalid_request", "stream"),
        ({"stream_options": {"include_usage": True}}, 400, "invalid_request", "stream_options"),
        ({"model": "other"}, 404, "model_not_found", "model"),
        ({"model": None}, 400, "invalid_request", "model"),
        ({"n": 0}, 400, "invalid_request", "n"),
        ({"n": 129}, 400, "invalid_request", "n"),
        ({"n": "2"}, 400, "invalid_request", "n"),
        ({"logprobs": 21}, 400, "invalid_request", "logprobs"),
        ({"logprobs": -1}, 400, "invalid_request", "logprobs"),
        ({"logprobs": True}, 400, "invalid_request", "logprobs"),
        ({"top_logprobs": 1}, 400, "unsupported", "top_logprobs"),
        ({"min_tokens": -1}, 400, "invalid_request", "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, 400, "invalid_request", "min_tokens"),
        ({"ignore_eos": 1}, 400, "invalid_request", "ignore_eos"),
        ({"include_stop_str_in_output": "yes"}, 400, "invalid_request", "include_stop_str_in_output"),
        ({"presence_penalty": 2.5}, 400, "invalid_request", "presence_penalty"),
        ({"frequency_penalty": -2.5}, 400, "invalid_request", "frequency_penalty"),
        ({"logit_bias": {"5": 101}}, 400, "invalid_request", "logit_bias"),
        ({"logit_bias": {"five": 1}}, 400, "invalid_request", "logit_bias"),
        ({"logit_bias": {"-1": 1}}, 400, "invalid_request", "logit_bias"),
        ({"logit_bias": {"262": 1}}, 400, "invalid_request", "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, 400, "invalid_request", "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(301)}}, 400, "invalid_request", "logit_bias"),
        ({"lemix": {"max_staleness_s": 0}}, 400, "invalid_request", "max_staleness_s"),
        ({"echo": True}, 400, "unsupported", "echo"),
        ({"best_of": 3}, 400, "unsupported", "best_of"),
        ({"tools": [{}]}, 400, "unsupported", "tools"),
        ({"max_tokenz": 5}, 400, "invalid_request", "max_tokenz"),
        ({"lemix": {"slo": {"ttft_ms": 0}}}, 400, "invalid_request", "slo.ttft"),
        ({"lemix": {"reference": ""}}, 400, "invalid_request", "reference"),
        ({"lemix": {"reference": "x" * 300}}, 400, "context_length_exceeded", "reference"),
        ({"lemix": {"reference": "x", "reference_token_ids": [1]}}, 400, "invalid_request", "reference"),
        ({"lemix": {"unknown": 1}}, 400, "invalid_request", "lemix.unknown"),
        ({"lemix": {"request_id": "a b"}}, 400, "invalid_request", "request_id"),
        ({"lemix": {"session_id": "x" * 129}}, 400, "invalid_request", "session_id"),
    ],
)
async def test_bad_completion(
    gateway: Gateway, change: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    answer = await gateway.http.post("/v1/completions", content=_json({**_OK, **change}), headers=_JSON)
    assert answer.status_code == status, answer.text
    assert _problem(answer.json()) == (code, param)
    assert gateway.scheduler.submitted == []


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"messages": []}, "invalid_request", "messages"),
        ({"messages": "hi"}, "invalid_request", "messages"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "invalid_request", "messages.0.role"),
        ({"messages": [{"role": "user", "content": ""}]}, "invalid_request", "messages.0.content"),
        ({"messages": [{"role": "user"}]}, "invalid_request", "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unsupported", "messages.0.role"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "invalid_request", "max_completion_tokens"),
        ({"max_completion_tokens": 0}, "invalid_request", "max_tokens"),
        ({"logprobs": 1}, "invalid_request", "logprobs"),
        ({"top_logprobs": 2}, "invalid_request", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_request", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "invalid_request", "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "unsupported", "response_format"),
    ],
)
async def test_bad_chat(gateway: Gateway, change: dict[str, Any], code: str, param: str) -> None:
    answer = await gateway.http.post("/v1/chat/completions", json={**_CHAT, **change})
    assert answer.status_code == 400, answer.text
    assert _problem(answer.json()) == (code, param)


@pytest.mark.parametrize("value", ["soon", "", "0", "-1", "nan", "inf"])
async def test_bad_staleness_header(gateway: Gateway, value: str) -> None:
    answer = await gateway.http.post("/v1/completions", json=_OK, headers={"x-max-staleness": value})
    assert (answer.status_code, _problem(answer.json())) == (400, ("invalid_request", "x-max-staleness"))


async def test_context_error_has_the_numbers(gateway: Gateway) -> None:
    answer = await gateway.http.post("/v1/completions", json={**_OK, "max_tokens": 254})
    message = answer.json()["error"]["message"]
    assert "256" in message
    assert "254" in message
    assert "257" in message


async def test_parameters_at_their_defaults_are_taken(gateway: Gateway) -> None:
    neutral = {
        "n": 1, "logprobs": None, "min_tokens": None, "ignore_eos": None, "echo": False,
        "presence_penalty": 0, "frequency_penalty": 0.0, "best_of": 1,
        "user": "me", "logit_bias": {}, "suffix": None, "store": False,
    }  # fmt: skip
    assert (await gateway.http.post("/v1/completions", json={**_OK, **neutral})).status_code == 200


@pytest.mark.parametrize("body", [b"{", b"", b"\xff\xfe", b'{"a":' * 3000])
async def test_malformed_json(gateway: Gateway, body: bytes) -> None:
    answer = await gateway.http.post("/v1/completions", content=body, headers=_JSON)
    assert answer.status_code == 400
    assert _problem(answer.json()) == ("invalid_json", None)


async def test_json_that_is_no_object(gateway: Gateway) -> None:
    answer = await gateway.http.post("/v1/completions", json=[1])
    assert (answer.status_code, _problem(answer.json())) == (400, ("invalid_request", None))


async def test_not_a_number_is_refused(gateway: Gateway) -> None:
    content = b'{"model":"tiny","prompt":"x","temperature":NaN}'
    answer = await gateway.http.post("/v1/completions", content=content, headers=_JSON)
    assert (answer.status_code, _problem(answer.json())[0]) == (400, "invalid_request")


@pytest.mark.parametrize("announced", [True, False])
async def test_large_body(gateway: Gateway, announced: bool) -> None:
    content = b'{"model":"tiny","prompt":"' + b"x" * 30_000 + b'"}'

    async def pieces() -> Any:
        yield content

    body = content if announced else pieces()
    answer = await gateway.http.post("/v1/completions", content=body, headers=_JSON)
    assert answer.status_code == 413
    assert _problem(answer.json()) == ("request_too_large", None)
    assert (await gateway.http.get("/healthz")).status_code == 200


async def test_wrong_content_type(gateway: Gateway) -> None:
    answer = await gateway.http.post("/v1/completions", content=b"x", headers={"content-type": "text/plain"})
    assert (answer.status_code, _problem(answer.json())[0]) == (415, "unsupported_media_type")


async def test_unknown_route_and_method(gateway: Gateway) -> None:
    answer = await gateway.http.get("/v1/nothing")
    assert (answer.status_code, _problem(answer.json())[0]) == (404, "not_found")
    answer = await gateway.http.get("/v1/completions")
    assert (answer.status_code, _problem(answer.json())[0]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("value", ["soon", "nan", "-1", "inf"])
async def test_bad_slo_header(gateway: Gateway, value: str) -> None:
    answer = await gateway.http.post("/v1/completions", json=_OK, headers={"x-slo-ttft-ms": value})
    assert (answer.status_code, _problem(answer.json())[0]) == (400, "invalid_request")


async def test_a_rejection_is_told_with_its_status(gateway: Gateway) -> None:
    for stream in (False, True):
        gateway.scheduler.reject = LemixError(ErrorCode.OVERLOADED, "too many requests wait", retry_after_s=1.2)
        answer = await gateway.http.post("/v1/completions", json={**_OK, "stream": stream})
        assert (answer.status_code, _problem(answer.json())[0]) == (429, "overloaded")
        assert answer.headers["retry-after"] == "2"
        gateway.scheduler.reject = LemixError(ErrorCode.UNAVAILABLE, "no node is ready", retry_after_s=1)
        answer = await gateway.http.post("/v1/completions", json={**_OK, "stream": stream})
        assert (answer.status_code, _problem(answer.json())[0]) == (503, "unavailable")


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


_JSON = {"content-type": "application/json"}
