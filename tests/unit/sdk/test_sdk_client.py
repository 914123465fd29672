"""The clients against a fake transport: retries, deadlines, conversion."""

from collections.abc import AsyncGenerator, Generator
from typing import Any

import pytest

import lemix
from lemix import _calls, aio
from lemix._calls import Call
from lemix.errors import ErrorCode, LemixError
from lemix.testing import FakeLemix
from lemix.types import GenerationOptions
from lemix.v1 import inference_service_pb2 as inference_pb

_GONE = LemixError(ErrorCode.UNAVAILABLE, "no server")


class Scripted:
    """A transport that plays a list: an exception is raised, a list of messages is streamed or its first returned."""

    def __init__(self, *script: Any) -> None:
        self.script = list(script)
        self.requests: list[Any] = []
        self.timeouts: list[float] = []
        self.closed_streams = 0

    def _next(self, call: Call[Any], timeout_s: float) -> list[Any]:
        self.requests.append(call.request)
        self.timeouts.append(timeout_s)
        step = self.script.pop(0)
        if isinstance(step, LemixError):
            raise step
        return list(step)

    def unary(self, call: Call[Any], timeout_s: float) -> Any:
        return self._next(call, timeout_s)[0]

    def stream(self, call: Call[Any], timeout_s: float) -> Generator[Any]:
        try:
            for message in self._next(call, timeout_s):
                if isinstance(message, LemixError):
                    raise message
                yield message
        finally:
            self.closed_streams += 1

    def close(self) -> None:
        self.script.append("closed")


class AioScripted(Scripted):
    async def unary(self, call: Call[Any], timeout_s: float) -> Any:  # type: ignore[override]
        return self._next(call, timeout_s)[0]

    async def stream(self, call: Call[Any], timeout_s: float) -> AsyncGenerator[Any]:  # type: ignore[override]
        try:
            for message in self._next(call, timeout_s):
                if isinstance(message, LemixError):
                    raise message
                yield message
        finally:
            self.closed_streams += 1

    async def close(self) -> None:  # type: ignore[override]
        self.script.append("closed")


def _client(transport: Scripted) -> tuple[lemix.Client, list[float]]:
    pauses: list[float] = []
    return lemix.Client(transport=transport, timeout_s=60, sleep=pauses.append), pauses


def _text(text: str) -> inference_pb.GenerateResponse:
    return inference_pb.GenerateResponse(text=text)


def _piece(text: str) -> inference_pb.GenerateStreamResponse:
    return inference_pb.GenerateStreamResponse(text_delta=text)


def test_an_unreachable_server_is_tried_again_with_the_same_request_id() -> None:
    transport = Scripted(_GONE, _GONE, [_text("ok")])
    client, pauses = _client(transport)
    assert client.generate("abc").text == "ok"
    assert pauses == [0.1, 0.2]
    ids = {request.spec.request_id for request in transport.requests}
    assert len(ids) == 1
    assert ids != {""}


def test_tries_are_bounded() -> None:
    transport = Scripted(*[_GONE] * 10)
    client, pauses = _client(transport)
    with pytest.raises(LemixError) as raised:
        client.generate("abc")
    assert raised.value.code is ErrorCode.UNAVAILABLE
    assert len(transport.requests) == 4
    assert len(pauses) == 3


def test_no_pause_beyond_the_deadline() -> None:
    transport = Scripted(LemixError(ErrorCode.UNAVAILABLE, "later", retry_after_s=1.5), [_text("ok")])
    client, pauses = _client(transport)
    with pytest.raises(LemixError):
        client.generate("abc", timeout_s=1.0)
    assert pauses == []


@pytest.mark.parametrize("code", [code for code in ErrorCode if code is not ErrorCode.UNAVAILABLE])
def test_other_failures_are_not_tried_again(code: ErrorCode) -> None:
    transport = Scripted(LemixError(code, "no", retry_after_s=0.1))
    client, pauses = _client(transport)
    with pytest.raises(LemixError) as raised:
        client.generate("abc")
    assert (raised.value.code, pauses) == (code, [])


def test_an_upload_is_never_repeated() -> None:
    client, pauses = _client(Scripted(_GONE))
    with pytest.raises(LemixError):
        client.upload_file(b"{}")
    assert pauses == []


def test_a_stream_is_tried_again_only_before_its_first_message() -> None:
    client, _ = _client(Scripted(_GONE, [_piece("a"), _piece("b")]))
    assert [chunk.text for chunk in client.stream("x")] == ["a", "b"]
    client, pauses = _client(Scripted([_piece("a"), _GONE]))
    stream = client.stream("x")
    assert next(stream).text == "a"
    with pytest.raises(LemixError):
        next(stream)
    assert pauses == []


def test_closing_a_stream_closes_the_call() -> None:
    transport = Scripted([_piece("a"), _piece("b")])
    client, _ = _client(transport)
    stream = client.stream("x")
    next(stream)
    stream.close()
    assert transport.closed_streams == 1


def test_every_call_has_a_deadline() -> None:
    transport = Scripted([_text("a")], [_text("b")])
    client, _ = _client(transport)
    client.generate("x")
    client.generate("x", timeout_s=3)
    assert 59 < transport.timeouts[0] <= 60
    assert 2.9 < transport.timeouts[1] <= 3


async def test_the_asyncio_client_behaves_the_same() -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    transport = AioScripted(_GONE, [_text("ok")], _GONE, [_piece("a"), _piece("b")], [_piece("c"), _GONE])
    async with aio.Client(transport=transport, sleep=sleep) as client:
        assert (await client.generate("x")).text == "ok"
        assert [chunk.text async for chunk in client.stream("x")] == ["a", "b"]
        with pytest.raises(LemixError):
            _ = [chunk async for chunk in client.stream("x")]
    assert pauses == [0.1, 0.1]
    assert transport.script == ["closed"]


async def test_closing_an_asyncio_stream_closes_the_call() -> None:
    transport = AioScripted([_piece("a"), _piece("b")])
    stream = aio.Client(transport=transport).stream("x")
    await anext(stream)
    await stream.aclose()
    assert transport.closed_streams == 1


@pytest.mark.parametrize(
    "options", [{"max_tokens": -1}, {"max_tokens": "many"}, {"seed": -5}, {"stop": [1]}, {"top_k": 2**40}]
)
def test_values_no_message_can_carry_are_lemix_errors(options: Any) -> None:
    with pytest.raises(LemixError) as raised:
        FakeLemix().client().generate("x", **options)
    assert raised.value.code is ErrorCode.INVALID_REQUEST


def test_misuse_is_told() -> None:
    client = FakeLemix().client()
    with pytest.raises(TypeError, match="max_tokenz"):
        client.generate("x", max_tokenz=3)  # type: ignore[call-arg]
    for call in (
        lambda: client.generate([-1]),
        lambda: client.feedback(),
        lambda: client.feedback("a", prompt="b"),
        lambda: client.list_jobs(0),
        lambda: client.create_job("f", hyperparameters=lemix.Hyperparameters(num_epochs=-1)),
    ):
        with pytest.raises(LemixError) as raised:
            call()
        assert raised.value.code is ErrorCode.INVALID_REQUEST
    with pytest.raises(LemixError, match="cannot read"):
        client.upload_file("/nowhere/at/all.jsonl")


def test_the_fake_answers_everything() -> None:
    fake = FakeLemix(["one two", "three"])
    with fake.client() as client:
        assert client.generate("p").text == "one two"
        assert "".join(chunk.text for chunk in client.stream_chat([("user", "q")])) == "three"
        job = client.submit_training(b'{"text": "a"}\n{"text": "b"}')
        assert (job.status, job.num_examples) == (lemix.JobStatus.SUCCEEDED, 2)
        assert job.status.ended
        assert [event.job.job_id for event in client.watch(job.job_id)] == [job.job_id]
        assert client.list_jobs() == [job]
        with pytest.raises(LemixError, match="ended"):
            client.cancel_job(job.job_id)
        (checkpoint,) = client.save_checkpoint(job.job_id)
        assert client.list_checkpoints() == [checkpoint]
        assert client.list_checkpoints("other") == []
        assert checkpoint.trained_microbatches == {job.job_id: 2}
        assert client.export_checkpoint(checkpoint.checkpoint_id).node_id == "fake-node"
        assert client.restore_checkpoint(checkpoint.checkpoint_id, node_id="n1").node_id == "n1"
        assert client.publish_checkpoint(checkpoint.checkpoint_id, node_ids=["n1"])[0].step == 1
        with pytest.raises(LemixError, match="no checkpoint"):
            client.restore_checkpoint("unknown")
        with pytest.raises(LemixError, match="line 2"):
            client.upload_file(b"{}\n{")
        assert client.feedback("learn").sequence == 1
        assert client.status().ready
        assert client.models()[0].max_context_tokens == 4096
    assert fake.prompts == ["p", [("user", "q")]]
    fake.fail_next(LemixError(ErrorCode.OVERLOADED, "full"))
    with pytest.raises(LemixError, match="full"):
        fake.client().generate("x")


async def test_the_fake_serves_asyncio_too() -> None:
    async with FakeLemix(["a b"]).aio_client() as client:
        assert (await client.chat([lemix.Message("user", "q")])).text == "a b"
        assert "".join([chunk.text async for chunk in client.stream("p")]) == "a b"


def test_a_real_unreachable_server_is_one_lemix_error() -> None:
    with lemix.Client("127.0.0.1:1", sleep=lambda _: None) as client, pytest.raises(LemixError) as raised:
        client.models(timeout_s=5)
    assert raised.value.code is ErrorCode.UNAVAILABLE


def test_the_fake_gives_as_many_replies_as_are_wanted() -> None:
    client = FakeLemix(["one", "two words", "three"]).client()
    generation = client.generate("x", n=2)
    assert [choice.text for choice in generation.choices] == ["one", "two words"]
    assert generation.usage.completion_tokens == 3
    chunks = list(client.stream("x", n=2))
    assert {chunk.choice_index for chunk in chunks} == {0, 1}
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_every_sampling_option_is_sent() -> None:
    options: GenerationOptions = {
        "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 1, "stop": ["a"], "n": 2, "logprobs": 4,
        "include_stop_str_in_output": True, "ignore_eos": True, "min_tokens": 2, "presence_penalty": 1.0,
        "frequency_penalty": -1.0, "logit_bias": {7: 2.0},
    }  # fmt: skip
    made = _calls.spec("x", None, max_staleness_s=3.0, **options)
    sent = {field.name: value for field, value in made.sampling.ListFields()}
    assert {**sent, "logit_bias": dict(sent["logit_bias"]), "stop": list(sent["stop"])} == options
    assert made.max_staleness_s == 3.0
    with pytest.raises(LemixError) as raised:
        _calls.spec("x", None, min_tokens=-1)
    assert raised.value.code is ErrorCode.INVALID_REQUEST
