"""The gRPC API through the SDK, blocking and asyncio, against the real gateway."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

import lemix
from lemix import aio
from lemix.errors import ErrorCode, LemixError
from lemix.v1 import inference_service_pb2, inference_service_pb2_grpc
from tests.integration.gateway.conftest import MODEL, Gateway, eventually
from tests.integration.gateway.fakes import Script


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[aio.Client]:
    async with aio.Client(gateway.grpc_address, timeout_s=10) as client:
        yield client


async def test_generate(gateway: Gateway, client: aio.Client) -> None:
    result = await client.generate(
        "abc", max_tokens=30, temperature=0, stop="zzz", slo=lemix.Slo(ttft_s=0.5), reference="xyz", request_id="r"
    )
    assert (result.request_id, result.model, result.text) == ("r", MODEL, "hello world")
    assert result.finish_reason is lemix.FinishReason.STOP
    assert result.usage.prompt_tokens == 3
    assert result.report.weight_versions == (
        lemix.WeightVersion(node_id="node-0", incarnation=1, step=235, job_id="job-7"),
    )
    assert (result.report.staleness_s, result.report.reference_loss) == (0.5, 1.25)
    work = gateway.scheduler.submitted[0][1]
    assert (work.sampling.max_tokens, work.sampling.temperature, work.slo.ttft_s) == (30, 0.0, 0.5)
    assert work.deadline_unix_s - work.arrival_unix_s <= 10.1  # gRPC rounds timeouts up, from 10 s on to tenths


async def test_chat_and_stream(client: aio.Client) -> None:
    assert (await client.chat([("user", "hi")])).text == "hello world"
    chunks = [chunk async for chunk in client.stream([1, 2, 3], max_tokens=20)]
    assert "".join(chunk.text for chunk in chunks) == "hello world"
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [lemix.FinishReason.STOP]
    assert chunks[-1].usage == lemix.Usage(prompt_tokens=3, completion_tokens=len(Script().tokens(99)))
    assert chunks[-1].report is not None


async def test_closing_a_stream_frees_the_request(gateway: Gateway, client: aio.Client) -> None:
    gateway.scheduler.script = Script(hold_after=2)
    stream = client.stream("abc", request_id="r")
    assert (await anext(stream)).request_id == "r"
    await stream.aclose()
    async with asyncio.timeout(5):
        assert await gateway.scheduler.cancels.get() == "r"
    await eventually(lambda: gateway.application.link.num_pending == 0)


async def test_the_callers_deadline_frees_the_request(gateway: Gateway, client: aio.Client) -> None:
    gateway.scheduler.script = Script(hold_after=0)
    with pytest.raises(LemixError) as raised:
        await client.generate("abc", request_id="r", timeout_s=0.2)
    assert raised.value.code is ErrorCode.DEADLINE_EXCEEDED
    async with asyncio.timeout(5):
        assert await gateway.scheduler.cancels.get() == "r"


@pytest.mark.parametrize(
    ("prompt", "options", "code", "param"),
    [
        ("", {}, ErrorCode.INVALID_REQUEST, "prompt"),
        ([], {}, ErrorCode.INVALID_REQUEST, "prompt"),
        ("abc", {"model": "other"}, ErrorCode.MODEL_NOT_FOUND, "model"),
        ("abc", {"max_tokens": 0}, ErrorCode.INVALID_REQUEST, "max_tokens"),
        ("abc", {"max_tokens": 300}, ErrorCode.CONTEXT_LENGTH_EXCEEDED, "max_tokens"),
        ("abc", {"temperature": 3.0}, ErrorCode.INVALID_REQUEST, "temperature"),
        ("abc", {"request_id": "no spaces"}, ErrorCode.INVALID_REQUEST, "request_id"),
    ],
)
async def test_errors_keep_code_and_param(
    client: aio.Client, prompt: Any, options: Any, code: ErrorCode, param: str
) -> None:
    with pytest.raises(LemixError) as raised:
        await client.generate(prompt, **options)
    assert (raised.value.code, raised.value.param) == (code, param)
    with pytest.raises(LemixError) as raised:
        _ = [chunk async for chunk in client.stream(prompt, **options)]
    assert raised.value.code is code


async def test_retry_after_travels(gateway: Gateway, client: aio.Client) -> None:
    gateway.scheduler.reject = LemixError(ErrorCode.OVERLOADED, "full", retry_after_s=1.5)
    with pytest.raises(LemixError) as raised:
        await client.generate("abc")
    assert (raised.value.code, raised.value.retry_after_s) == (ErrorCode.OVERLOADED, 1.5)


async def test_raw_defaults_are_openais(gateway: Gateway) -> None:
    async with grpc.aio.insecure_channel(gateway.grpc_address) as channel:
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
        spec = inference_service_pb2.GenerationSpec(text="abc")
        await stub.Generate(inference_service_pb2.GenerateRequest(spec=spec), timeout=5)
    sampling = gateway.scheduler.submitted[0][1].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (16, 1.0, 1.0, 0)


def _blocking_training(address: str, file: Path) -> list[str]:
    with lemix.Client(address, timeout_s=10) as client:
        job = client.submit_training(file, hyperparameters=lemix.Hyperparameters(num_epochs=2))
        assert job.status is lemix.JobStatus.RUNNING
        assert job.hyperparameters.num_epochs == 2
        messages = [event.message for event in client.watch(job.job_id)]
        assert client.get_job(job.job_id) == job
        assert client.list_jobs() == [job]
        paused = client.pause_job(job.job_id).status
        assert (paused, paused.ended) == (lemix.JobStatus.PAUSED, False)
        assert client.resume_job(job.job_id).status is lemix.JobStatus.RUNNING
        assert client.cancel_job(job.job_id).status is lemix.JobStatus.CANCELLED
        assert client.feedback(prompt="q", completion="a").sequence == 1
        assert [model.model_id for model in client.models()] == [MODEL]
        status = client.status()
        assert (status.policy, status.ready, status.nodes[0].weight_step) == ("lemix", True, 235)
        with pytest.raises(LemixError, match="no job"):
            client.get_job("none")
        return messages


async def test_training_with_the_blocking_client(gateway: Gateway, tmp_path: Path) -> None:
    file = tmp_path / "examples.jsonl"
    file.write_text('{"text": "abc"}\n{"prompt": "a", "completion": "b"}\n')
    messages = await asyncio.to_thread(_blocking_training, gateway.grpc_address, file)
    assert messages == ["micro-batch 1", "micro-batch 2", "micro-batch 3"]
    assert gateway.scheduler.files["file-1"][0].filename == "examples.jsonl"


async def test_training_with_the_asyncio_client(gateway: Gateway, client: aio.Client) -> None:
    with pytest.raises(LemixError, match="line 2: not JSON") as raised:
        await client.upload_file(b'{"text": "abc"}\n{')
    assert raised.value.code is ErrorCode.INVALID_TRAINING_FILE
    job = await client.submit_training(b'{"text": "abc"}')
    events = [event async for event in client.watch(job.job_id, after_sequence=1)]
    assert [event.sequence for event in events] == [2, 3]
    assert events[0].loss == 1.5
    assert events[0].job.job_id == job.job_id
    receipt = await client.feedback(messages=[("user", "q"), ("assistant", "a")])
    assert receipt == lemix.FeedbackReceipt(job_id="feedback", sequence=1)
    gateway.scheduler.ready = False
    status = await client.status()
    assert (status.ready, status.not_ready_reason) == (False, "no node is ready")
