"""The official OpenAI client works unchanged."""

from collections.abc import AsyncIterator

import httpx
import openai
import pytest

from tests.integration.gateway.conftest import MODEL, Gateway


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, http_client=httpx.AsyncClient(trust_env=False)
    ) as client:
        yield client


async def test_completions(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt="abc", max_tokens=20, seed=-1, extra_body={"top_k": 5})
    assert answer.choices[0].text == "hello world"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3
    text = ""
    async for chunk in await client.completions.create(model=MODEL, prompt="abc", stream=True):
        text += chunk.choices[0].text
    assert text == "hello world"


async def test_chat(client: openai.AsyncOpenAI) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
    ]
    answer = await client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    assert answer.choices[0].message.content == "hello world"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model_extra is not None
    assert answer.model_extra["lemix"]["node_id"] == "node-0"
    stream = await client.chat.completions.create(
        model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello world"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens > 0


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).owned_by == "lemix"


async def test_fine_tuning(client: openai.AsyncOpenAI) -> None:
    file = await client.files.create(file=("data.jsonl", b'{"text": "abc"}'), purpose="fine-tune")
    assert (await client.files.retrieve(file.id)).filename == "data.jsonl"
    job = await client.fine_tuning.jobs.create(
        model=MODEL, training_file=file.id, hyperparameters={"n_epochs": 2}, extra_body={"lemix": {"weight_decay": 0.1}}
    )
    assert job.hyperparameters.n_epochs == 2
    assert (await client.fine_tuning.jobs.retrieve(job.id)).status == "running"
    assert [listed.id async for listed in client.fine_tuning.jobs.list()] == [job.id]
    events = [event async for event in client.fine_tuning.jobs.list_events(job.id, limit=2)]
    assert [event.message for event in events] == ["micro-batch 3", "micro-batch 2", "micro-batch 1"]
    assert (await client.fine_tuning.jobs.pause(job.id)).status == "paused"
    assert (await client.fine_tuning.jobs.resume(job.id)).status == "running"
    assert (await client.fine_tuning.jobs.cancel(job.id)).status == "cancelled"


async def test_errors_are_the_clients_own_classes(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.completions.create(model="other", prompt="abc")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await client.completions.create(model=MODEL, prompt="abc", max_tokens=1000)
    assert (bad.value.code, bad.value.param) == ("context_length_exceeded", "max_tokens")
