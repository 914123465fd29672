"""What a request may ask of its tokens: several choices, log-probabilities, stop strings, penalties; by OpenAI's client
and by the SDK."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import openai
import pytest

from lemix import aio
from lemix.errors import ErrorCode, LemixError
from services.gateway.merge import merged
from tests.integration.gateway.conftest import MODEL, Gateway, eventually
from tests.integration.gateway.fakes import Script

TOKENS = Script().tokens(99)
MESSAGES = [{"role": "user", "content": "q"}]


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, http_client=httpx.AsyncClient(trust_env=False)
    ) as client:
        yield client


@pytest.fixture
async def sdk(gateway: Gateway) -> AsyncIterator[aio.Client]:
    async with aio.Client(gateway.grpc_address, timeout_s=10) as client:
        yield client


async def test_choices(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    extra = {"lemix": {"request_id": "r", "session_id": "s", "reference": "xyz"}}
    answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES, n=3, seed=2**64 - 2, extra_body=extra)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {"hello world"}
    works = dict(gateway.scheduler.submitted)
    assert [works[name].sampling.seed for name in ("r", "r#1", "r#2")] == [2**64 - 2, 2**64 - 1, 0]
    assert [works[name].session_id for name in ("r", "r#1", "r#2")] == ["s", "", ""]
    assert [works[name].choice_of for name in ("r", "r#1", "r#2")] == ["", "r", "r"]
    assert [len(works[name].reference_token_ids) for name in ("r", "r#1", "r#2")] == [3, 0, 0]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(works["r"].prompt_token_ids)
    assert answer.usage.completion_tokens == 3 * len(TOKENS)
    assert answer.choices[1].model_extra is not None
    assert answer.choices[1].model_extra["lemix"]["node_id"] == "node-0"


async def test_streamed_choices(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, n=2, stream=True, stream_options={"include_usage": True}
    )
    texts, roles, reasons = ["", ""], ["", ""], [[], []]
    chunks = [chunk async for chunk in stream]
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role or ""
        reasons[choice.index] += [choice.finish_reason] if choice.finish_reason else []
    assert texts == ["hello world"] * 2
    assert roles == ["assistant"] * 2
    assert reasons == [["stop"]] * 2
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2 * len(TOKENS)


async def test_choices_through_the_sdk(sdk: aio.Client) -> None:
    result = await sdk.generate("abc", n=3, seed=1, logprobs=1)
    assert [choice.text for choice in result.choices] == ["hello world"] * 3
    assert result.usage.completion_tokens == 3 * len(TOKENS)
    assert [len(choice.logprobs) for choice in result.choices] == [len(TOKENS)] * 3
    assert result.logprobs[0].top[0].token == "a"
    chunks = [chunk async for chunk in sdk.stream("abc", n=2)]
    for index in range(2):
        mine = [chunk for chunk in chunks if chunk.choice_index == index]
        assert "".join(chunk.text for chunk in mine) == "hello world"
        assert [chunk.finish_reason is not None for chunk in mine] == [False] * (len(mine) - 1) + [True]
        assert mine[-1].report is not None
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


async def test_closing_a_stream_frees_every_choice(gateway: Gateway, sdk: aio.Client) -> None:
    gateway.scheduler.script = Script(hold_after=2)
    stream = sdk.stream("abc", request_id="r", n=3)
    await anext(stream)
    await stream.aclose()
    async with asyncio.timeout(5):
        cancelled = {await gateway.scheduler.cancels.get() for _ in range(3)}
    assert cancelled == {"r", "r#1", "r#2"}
    await eventually(lambda: gateway.application.link.num_pending == 0)


async def test_one_refused_choice_refuses_all(gateway: Gateway, sdk: aio.Client) -> None:
    gateway.scheduler.script = Script(hold_after=2)
    gateway.scheduler.reject_ids = {"r#1"}
    with pytest.raises(LemixError) as error:
        await sdk.generate("abc", request_id="r", n=3)
    assert error.value.code is ErrorCode.OVERLOADED
    async with asyncio.timeout(5):
        assert {await gateway.scheduler.cancels.get() for _ in range(2)} == {"r", "r#2"}
    await eventually(lambda: gateway.application.link.num_pending == 0)


class TestBound:
    """All choices are admitted or none."""

    @pytest.fixture
    def overrides(self) -> dict[str, object]:
        return {"limits": {"max_concurrent_requests": 3}}

    async def test_choices_count_towards_the_bound(self, gateway: Gateway, sdk: aio.Client) -> None:
        with pytest.raises(LemixError) as error:
            await sdk.generate("abc", n=4)
        assert (error.value.code, error.value.param) == (ErrorCode.INVALID_REQUEST, "n")
        gateway.scheduler.script = Script(hold_after=1)
        held = sdk.stream("abc", n=2)
        await anext(held)
        with pytest.raises(LemixError) as error:
            await sdk.generate("abc", n=2)
        assert error.value.code is ErrorCode.OVERLOADED
        assert len(gateway.scheduler.submitted) == 2
        gateway.scheduler.script = Script()
        assert (await sdk.generate("abc")).text == "hello world"
        await held.aclose()


async def test_chat_logprobs(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2)
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert "".join(item.token for item in told.content) == "hello world</s>"
    assert [item.logprob for item in told.content] == [-0.5] * len(TOKENS)
    assert [(top.token, top.logprob, top.bytes) for top in told.content[0].top_logprobs] == [
        ("a", -1.0, [97]), ("b", -2.0, [98]),
    ]  # fmt: skip
    stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, stream=True)
    items = []
    async for chunk in stream:
        logprobs = chunk.choices[0].logprobs
        items += logprobs.content or [] if logprobs else []
    assert "".join(item.token for item in items) == "hello world</s>"
    assert {len(item.top_logprobs) for item in items} == {0}
    assert [work.sampling.logprobs for _, work in gateway.scheduler.submitted] == [2, 0]


async def test_completion_logprobs(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt="abc", logprobs=1)
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.tokens is not None
    assert told.text_offset == [sum(map(len, told.tokens[:i])) for i in range(len(told.tokens))]
    assert told.token_logprobs == [-0.5] * len(TOKENS)
    assert told.top_logprobs is not None
    assert told.top_logprobs[0] == {"a": -1.0, told.tokens[0]: -0.5}
    stream = await client.completions.create(model=MODEL, prompt="abc", logprobs=0, stream=True)
    offsets: list[int] = []
    async for chunk in stream:
        logprobs = chunk.choices[0].logprobs
        offsets += logprobs.text_offset or [] if logprobs else []
    assert offsets == told.text_offset


async def test_logprobs_of_a_stored_result(client: openai.AsyncOpenAI) -> None:
    extra = {"lemix": {"request_id": "same"}}
    answers = [
        await client.completions.create(model=MODEL, prompt="abc", logprobs=1, extra_body=extra) for _ in range(2)
    ]
    assert answers[0].choices == answers[1].choices


async def test_the_stop_string_is_shown_if_asked_for(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    gateway.scheduler.script = Script(text="one END two three")
    extra = {"include_stop_str_in_output": True}
    answer = await client.completions.create(
        model=MODEL, prompt="x", max_tokens=50, stop=[" END"], logprobs=0, extra_body=extra
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("one END", "stop")
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.tokens is not None
    assert "".join(told.tokens) == "one END"
    assert list(gateway.scheduler.submitted[0][1].sampling.stop) == [" END"]
    late = {"min_tokens": 7}
    answer = await client.completions.create(model=MODEL, prompt="x", max_tokens=50, stop=["e"], extra_body=late)
    assert answer.choices[0].text == "one END two thr"


async def test_penalties_and_bias_reach_the_node(gateway: Gateway, client: openai.AsyncOpenAI, sdk: aio.Client) -> None:
    extra = {"min_tokens": 2, "ignore_eos": True}
    await client.completions.create(
        model=MODEL, prompt="x", presence_penalty=-1.5, frequency_penalty=2, logit_bias={"5": -100, "007": 1.5},
        extra_body=extra,
    )  # fmt: skip
    await sdk.generate(
        "x", presence_penalty=-1.5, frequency_penalty=2, logit_bias={5: -100, 7: 1.5}, min_tokens=2, ignore_eos=True
    )
    for _, work in gateway.scheduler.submitted:
        sampling = work.sampling
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1.5, 2.0)
        assert dict(sampling.logit_bias) == {5: -100.0, 7: 1.5}
        assert (sampling.min_tokens, sampling.ignore_eos) == (2, True)


async def test_the_freshness_wanted_reaches_the_scheduler(gateway: Gateway, sdk: aio.Client) -> None:
    await gateway.http.post("/v1/completions", json={"model": MODEL, "prompt": "x"}, headers={"x-max-staleness": "2.5"})
    body = {"model": MODEL, "prompt": "x", "lemix": {"max_staleness_s": 7}}
    await gateway.http.post("/v1/completions", json=body, headers={"x-max-staleness": "2.5"})
    await sdk.generate("x", max_staleness_s=30)
    await sdk.generate("x")
    works = [work for _, work in gateway.scheduler.submitted]
    assert [work.max_staleness_s for work in works[:3]] == [2.5, 7.0, 30.0]
    assert not works[3].HasField("max_staleness_s")
    gateway.scheduler.reject = LemixError(ErrorCode.STALE_WEIGHTS, "the freshest weights are 12 s old")
    answer = await gateway.http.post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (412, "stale_weights")


async def test_merged_sources_end_together() -> None:
    closed = []

    async def source(name: str, count: int, *, fails: bool = False) -> AsyncIterator[str]:
        try:
            for index in range(count):
                yield f"{name}{index}"
            if fails:
                raise ValueError(name)
            await asyncio.sleep(0)
        finally:
            closed.append(name)

    found = [item async for item in merged([source("a", 3), source("b", 0), source("c", 2)])]
    assert [item for item in found if item[0] == "a"] == ["a0", "a1", "a2"]
    assert sorted(found) == ["a0", "a1", "a2", "c0", "c1"]
    assert sorted(closed) == ["a", "b", "c"]
    closed.clear()
    with pytest.raises(ValueError, match="b"):
        async for _ in merged([source("a", 10**9), source("b", 2, fails=True)]):
            pass
    assert sorted(closed) == ["a", "b"]
    closed.clear()
    endless = merged([source("a", 10**9), source("b", 10**9)])
    await anext(endless)
    await endless.aclose()
    assert sorted(closed) == ["a", "b"]
