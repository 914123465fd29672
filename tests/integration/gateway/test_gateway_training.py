"""Files, jobs, events and feedback over REST."""

import asyncio
import json
from typing import Any

import pytest

from lemix import aio
from tests.integration.gateway.conftest import MODEL, Gateway
from tests.unit.gateway.model_files import BOS, EOS


@pytest.fixture
def overrides() -> dict[str, Any]:
    return {"limits": {"max_file_bytes": 100_000, "max_concurrent_uploads": 1}}


async def _upload(gateway: Gateway, content: bytes, purpose: str = "fine-tune") -> Any:
    return await gateway.http.post("/v1/files", files={"file": ("train.jsonl", content)}, data={"purpose": purpose})


async def test_a_file_is_tokenised_and_stored(gateway: Gateway) -> None:
    lines = [
        {"text": "abc"},
        {"prompt": "ab", "completion": "cd"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ]
    content = b"\n".join(json.dumps(line).encode() for line in lines) + b"\n\n"
    answer = await _upload(gateway, content)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["object"] == "file"
    assert (body["bytes"], body["filename"], body["purpose"], body["status"]) == (
        len(content), "train.jsonl", "fine-tune", "processed",
    )  # fmt: skip
    assert (await gateway.http.get(f"/v1/files/{body['id']}")).json() == body
    _, examples = gateway.scheduler.files[body["id"]]
    assert [(list(e.token_ids), e.num_context_tokens) for e in examples] == [
        ([97, 98, 99, EOS], 0),
        ([97, 98, 99, 100, EOS], 2),
        ([BOS, *b"[user]q[assistant]a", EOS], 1 + len("[user]q[assistant]")),
    ]


async def test_a_large_file_goes_in_batches(gateway: Gateway) -> None:
    line = json.dumps({"text": "x" * 200}).encode() + b"\n"
    answer = await _upload(gateway, line * 400)
    found = answer.json()["lemix"]
    assert (found["num_examples"], found["max_tokens"]) == (400, 201)
    assert gateway.scheduler.num_file_messages == 3


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not UTF-8"),
        (b"[1]", "not a JSON object"),
        (b'{"text": ""}', "empty"),
        (b'{"text": 5}', "must be a string"),
        (b'{"text": "a", "other": 1}', "needs either"),
        (b'{"prompt": "a"}', "needs either"),
        (b'{"prompt": "a", "completion": ""}', "empty"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"messages": []}', "non-empty list"),
        (b'{"messages": [{"role": "user", "content": "q"}]}', "assistant"),
        (b'{"messages": [{"role": "user", "content": 1}]}', "must be a string"),
        (b'{"text": "' + b"x" * 300 + b'"}', "301 tokens"),
    ],
)
async def test_a_broken_line_is_named(gateway: Gateway, line: bytes, reason: str) -> None:
    answer = await _upload(gateway, b'{"text": "fine"}\n' * 16 + line + b"\n")
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "invalid_training_file"
    assert error["message"].startswith("line 17: ")
    assert reason in error["message"]
    assert gateway.scheduler.files == {}


async def test_bad_uploads(gateway: Gateway) -> None:
    answer = await _upload(gateway, b"\n")
    assert answer.json()["error"]["code"] == "invalid_training_file"
    answer = await _upload(gateway, b'{"text": "a"}', purpose="batch")
    assert answer.json()["error"]["param"] == "purpose"
    answer = await gateway.http.post("/v1/files", json={"purpose": "fine-tune"})
    assert answer.status_code == 415
    answer = await gateway.http.post(
        "/v1/files", content=b"garbage", headers={"content-type": "multipart/form-data; boundary=b"}
    )
    assert answer.status_code == 400
    answer = await gateway.http.post("/v1/files", files={"other": b"x"}, data={"purpose": "fine-tune"})
    assert answer.json()["error"]["param"] == "file"
    answer = await _upload(gateway, b'{"text": "a"}\n' * 20_000)
    assert answer.status_code == 413
    error = (await gateway.http.get("/v1/files/file-9")).json()["error"]
    assert (error["code"], error["param"]) == ("not_found", "file_id")


async def test_uploads_beyond_the_bound_get_429(gateway: Gateway) -> None:
    async with gateway.application.training.upload_slot():
        answer = await _upload(gateway, b'{"text": "abc"}')
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
    assert (await _upload(gateway, b'{"text": "abc"}')).status_code == 200


async def _job(gateway: Gateway, **change: Any) -> Any:
    file_id = (await _upload(gateway, b'{"text": "abc"}')).json()["id"]
    return await gateway.http.post(
        "/v1/fine_tuning/jobs", json={"model": MODEL, "training_file": file_id, **change}, headers={"x-request-id": "j"}
    )


async def test_a_job_carries_openai_and_own_hyperparameters(gateway: Gateway) -> None:
    answer = await _job(
        gateway,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": "auto"}}},
        lemix={"learning_rate": 0.01, "lr_schedule": "cosine", "warmup_steps": 2, "kind": "online"},
    )
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["object"], body["status"], body["model"]) == ("fine_tuning.job", "running", MODEL)
    assert body["hyperparameters"] == {"n_epochs": 3, "batch_size": 1, "learning_rate_multiplier": 100.0}
    sent = gateway.scheduler.job_requests[0]
    assert (sent.request_id, sent.hyperparameters.num_epochs, sent.hyperparameters.lr_schedule) == ("j", 3, "cosine")
    assert not sent.hyperparameters.HasField("batch_size")


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"hyperparameters": {"n_epochs": 0}}, 400, "invalid_request"),
        ({"hyperparameters": {"n_epochs": -1}}, 400, "invalid_request"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, 400, "invalid_request"),
        ({"hyperparameters": {"batch_size": 1000}}, 400, "invalid_request"),
        ({"hyperparameters": {"n_epochs": 1}, "method": {"type": "supervised", "supervised": {"hyperparameters": {}}}},
         400, "invalid_request"),
        ({"lemix": {"lr_schedule": "wavy"}}, 400, "invalid_request"),
        ({"lemix": {"kind": "isolated"}}, 400, "invalid_request"),
        ({"method": {"type": "dpo"}}, 400, "invalid_request"),
        ({"suffix": "mine"}, 400, "unsupported"),
        ({"validation_file": "no/file"}, 400, "invalid_request"),
        ({"lemix": {"checkpoint": {"every_steps": -1}}}, 400, "invalid_request"),
        ({"lemix": {"checkpoint": {"often": 1}}}, 400, "invalid_request"),
        ({"lemix": {"quality_gate": {"tolerance": "low"}}}, 400, "invalid_request"),
        ({"training_file": "file-77"}, 404, "not_found"),
        ({"training_file": ""}, 400, "invalid_request"),
        ({"model": "other"}, 404, "model_not_found"),
    ],
)  # fmt: skip
async def test_bad_jobs(gateway: Gateway, change: dict[str, Any], status: int, code: str) -> None:
    answer = await _job(gateway, **change)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert gateway.scheduler.jobs == {}


async def test_jobs_are_listed_told_and_cancelled(gateway: Gateway) -> None:
    ids = [(await _job(gateway)).json()["id"] for _ in range(3)]
    page = (await gateway.http.get("/v1/fine_tuning/jobs", params={"limit": 2})).json()
    assert [job["id"] for job in page["data"]] == [ids[2], ids[1]]
    assert page["has_more"] is True
    page = (await gateway.http.get("/v1/fine_tuning/jobs", params={"limit": 2, "after": ids[1]})).json()
    assert ([job["id"] for job in page["data"]], page["has_more"]) == ([ids[0]], False)
    assert (await gateway.http.get("/v1/fine_tuning/jobs", params={"limit": 0})).status_code == 400
    assert (await gateway.http.get("/v1/fine_tuning/jobs", params={"limit": "x"})).status_code == 400
    assert (await gateway.http.get(f"/v1/fine_tuning/jobs/{ids[0]}")).json()["id"] == ids[0]
    assert (await gateway.http.post(f"/v1/fine_tuning/jobs/{ids[0]}/cancel")).json()["status"] == "cancelled"
    assert (await gateway.http.get("/v1/fine_tuning/jobs/none")).json()["error"]["code"] == "not_found"


async def test_events_are_paged_from_the_newest(gateway: Gateway) -> None:
    job_id = (await _job(gateway)).json()["id"]
    gateway.scheduler.endless.add(job_id)
    url = f"/v1/fine_tuning/jobs/{job_id}/events"
    page = (await gateway.http.get(url, params={"limit": 2})).json()
    assert [event["data"]["sequence"] for event in page["data"]] == [3, 2]
    assert page["has_more"] is True
    assert page["data"][0]["type"] == "metrics"
    assert page["data"][0]["data"]["train_loss"] == 1.0
    page = (await gateway.http.get(url, params={"limit": 2, "after": page["data"][-1]["id"]})).json()
    assert ([event["data"]["sequence"] for event in page["data"]], page["has_more"]) == ([1], False)
    assert (await gateway.http.get(url, params={"after": "nonsense"})).status_code == 400
    assert (await gateway.http.get("/v1/fine_tuning/jobs/none/events")).status_code == 404


async def test_events_can_be_followed(gateway: Gateway) -> None:
    job_id = (await _job(gateway)).json()["id"]
    url = f"/v1/fine_tuning/jobs/{job_id}/events"
    async with asyncio.timeout(5), gateway.http.stream("GET", url, params={"stream": "true"}) as answer:
        lines = [line async for line in answer.aiter_lines() if line]
    assert [json.loads(line[6:])["data"]["sequence"] for line in lines[:-1]] == [1, 2, 3]
    assert lines[-1] == "data: [DONE]"


@pytest.mark.parametrize(
    ("body", "tokens", "context"),
    [
        ({"text": "abc"}, [97, 98, 99, EOS], 0),
        ({"prompt": "a", "completion": "b"}, [97, 98, EOS], 1),
        ({"prompt": "", "completion": "b"}, [98, EOS], 0),
    ],
)
async def test_feedback(gateway: Gateway, body: dict[str, Any], tokens: list[int], context: int) -> None:
    answer = await gateway.http.post("/v1/feedback", json={**body, "model": MODEL, "request_id": "f"})
    assert answer.json() == {"object": "feedback", "job_id": "feedback", "sequence": 1}
    sent = gateway.scheduler.feedback[0]
    assert (list(sent.example.token_ids), sent.example.num_context_tokens) == (tokens, context)
    assert (sent.request_id, sent.model) == ("f", MODEL)


@pytest.mark.parametrize(
    "body", [{}, {"text": "a", "prompt": "b"}, {"text": ""}, {"prompt": "a"}, {"text": "a", "wrong": 1}, {"text": 1}]
)
async def test_bad_feedback(gateway: Gateway, body: dict[str, Any]) -> None:
    answer = await gateway.http.post("/v1/feedback", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")


async def test_checkpoints_are_asked_for_with_the_job(gateway: Gateway) -> None:
    wanted = {"checkpoint": {"every_steps": 5, "every_s": 2.5}, "quality_gate": {"tolerance": 0.1, "publish": True}}
    answer = await _job(gateway, validation_file="file-1", lemix=wanted)
    assert answer.status_code == 200, answer.text
    sent = gateway.scheduler.job_requests[0]
    assert (sent.checkpoint.every_steps, sent.checkpoint.every_s, sent.validation_file) == (5, 2.5, "file-1")
    assert (sent.quality_gate.tolerance, sent.quality_gate.publish) == (0.1, True)
    assert not sent.quality_gate.HasField("max_bad_evaluations")


async def test_checkpoints_are_saved_listed_exported_restored_and_published(gateway: Gateway) -> None:
    job_id = (await _job(gateway)).json()["id"]
    url = f"/v1/fine_tuning/jobs/{job_id}/checkpoints"
    saved = (await gateway.http.post(url)).json()["data"]
    assert [(item["id"], item["heldout_loss"], item["trained_microbatches"]) for item in saved] == [
        ("node-0:1:1", 2.5, {job_id: 1})
    ]
    assert (await gateway.http.post(url)).json()["data"][0]["heldout_loss"] is None  # it has diverged
    for listing in (url, "/v1/checkpoints"):
        listed = (await gateway.http.get(listing)).json()
        assert [item["id"] for item in listed["data"]] == ["node-0:1:2", "node-0:1:1"]
    exported = (await gateway.http.post("/v1/checkpoints/node-0:1:1/export")).json()
    assert exported == {"object": "checkpoint.export", "node_id": "node-0", "path": "/exports/x"}
    restored = (await gateway.http.post("/v1/checkpoints/node-0:1:1/restore", params={"node_id": "node-1"})).json()
    assert restored["weight_version"] == {"node_id": "node-1", "incarnation": 1, "step": 9}
    published = await gateway.http.post("/v1/checkpoints/node-0:1:1/publish", params={"node_id": ["node-1", "node-2"]})
    assert [version["node_id"] for version in published.json()["weight_versions"]] == ["node-1", "node-2"]
    assert (await gateway.http.post("/v1/checkpoints/node-0:1:2/publish")).status_code == 409
    assert (await gateway.http.post("/v1/checkpoints/node-0:1:2/publish?force=true")).status_code == 200
    for action in ("export", "restore", "publish"):
        assert (await gateway.http.post(f"/v1/checkpoints/node-9:1:1/{action}")).status_code == 404
        assert (await gateway.http.post(f"/v1/checkpoints/no%20id/{action}")).status_code == 400


async def test_lines_may_be_skipped_and_cut(gateway: Gateway) -> None:
    content = b'{"text": "abc"}\n{"text": 5}\n{"text": "' + b"x" * 300 + b'"}'
    files, data = {"file": ("data.jsonl", content)}, {"purpose": "fine-tune"}
    wishes = {"on_bad_line": "skip", "on_long_line": "truncate"}
    answer = await gateway.http.post("/v1/files", files=files, data={**data, **wishes})
    assert answer.json()["lemix"] == {"num_examples": 2, "max_tokens": 256, "num_skipped": 1, "num_truncated": 1}
    fewer = await gateway.http.post("/v1/files", files=files, data={**data, "on_bad_line": "skip"})
    assert fewer.json()["lemix"]["num_skipped"] == 2
    for name in wishes:
        answer = await gateway.http.post("/v1/files", files=files, data={**data, name: "keep"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    async with aio.Client(gateway.grpc_address, timeout_s=10) as client:
        stored = await client.upload_file(content, **wishes)
        assert (stored.num_examples, stored.num_skipped, stored.num_truncated) == (2, 1, 1)
