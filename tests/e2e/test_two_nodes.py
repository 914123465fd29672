"""Two replicas with real weights: serving, training, and what happens when a node or Redis goes away."""

import asyncio
import os
import signal

import httpx
import pytest
from cluster_under_test import PATIENCE_S, eventually, running

import lemix
from deploy.local.settings import LocalClusterConfig

#: Sampled, since a model with random weights only repeats itself otherwise; the seed makes it the same each time.
SAMPLED = {"temperature": 1, "seed": 7, "ignore_eos": True}
#: Long enough to be still running when something is killed.
LONG = {**SAMPLED, "max_tokens": 900}


@pytest.fixture(scope="module")
def cluster(model, profiles, tmp_path_factory):
    config = LocalClusterConfig(
        model_path=model,
        directory=tmp_path_factory.mktemp("run"),
        num_nodes=2,
        profiles_directory=profiles,
        scheduler={"node_lease_s": 2.0},
        profiler={"repetitions": 2},
    )
    with running(config) as user:
        yield user


@pytest.fixture
def user(cluster):
    """The cluster with every node ready, whatever the test before did to it."""
    eventually(cluster.all_ready, "every node is ready")
    return cluster


def text_of(chunks):
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])


def usage_of(answer):
    return tuple(answer["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens"))


def test_a_chat_is_answered(user):
    answer = user.chat("Hello", temperature=0)
    assert answer["object"] == "chat.completion"
    assert answer["model"] == user.model
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")
    assert 1 <= answer["usage"]["completion_tokens"] <= 8
    assert answer["lemix"]["node_id"] in ("node-0", "node-1")


def test_a_streamed_chat_says_the_same_as_a_whole_one(user):
    values = {**SAMPLED, "max_tokens": 40}
    whole = user.chat("Tell me", **values)
    with user.chat_stream("Tell me", **values) as stream:
        chunks = list(stream)
    assert len(chunks) > 3
    assert text_of(chunks) == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_the_sdk_generates_over_grpc(user):
    with lemix.Client(user.cluster.grpc_address) as client:
        result = client.generate("Once upon a time", max_tokens=12, temperature=0)
    whole = user.http.post(
        "/v1/completions",
        json={"model": user.model, "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0},
    )
    assert result.text == whole.json()["choices"][0]["text"]


def test_choices_are_what_requests_alone_would_give(user):
    """Choice i is the request with its seed + i, computed from one prompt: whole, streamed, and through the SDK."""
    values = {**SAMPLED, "max_tokens": 24}
    alone = [user.chat("three of them", **{**values, "seed": 7 + index}) for index in range(3)]
    expected = [answer["choices"][0]["message"]["content"] for answer in alone]
    assert len(set(expected)) == 3

    whole = user.chat("three of them", n=3, **values)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in whole["choices"]] == expected
    prompt_tokens = alone[0]["usage"]["prompt_tokens"]
    assert usage_of(whole) == (prompt_tokens, 3 * 24, prompt_tokens + 3 * 24)

    with user.chat_stream("three of them", n=3, stream_options={"include_usage": True}, **values) as stream:
        *chunks, last = list(stream)
    own = [[chunk for chunk in chunks if chunk["choices"][0]["index"] == index] for index in range(3)]
    assert [text_of(each) for each in own] == expected
    assert [each[-1]["choices"][0]["finish_reason"] for each in own] == ["length"] * 3
    assert (last["choices"], usage_of(last)) == ([], usage_of(whole))
    assert not any(chunk["usage"] for chunk in chunks)

    with lemix.Client(user.cluster.grpc_address) as client:
        result = client.generate("three of them", n=3, max_tokens=24, temperature=0, ignore_eos=True)
    assert len({choice.text for choice in result.choices}) == 1  # greedy: nothing to choose
    assert [len(choice.token_ids) for choice in result.choices] == [24] * 3
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (len("three of them"), 3 * 24)


def test_requests_at_once_are_answered_as_if_alone(user):
    def answer(index):
        return user.chat(f"question {index}", **{**SAMPLED, "seed": index}, max_tokens=24)["choices"][0]["message"][
            "content"
        ]

    async def at_once():
        return await asyncio.gather(*(asyncio.to_thread(answer, index) for index in range(8)))

    alone = [answer(index) for index in range(8)]
    assert len(set(alone)) == 8
    assert asyncio.run(at_once()) == alone


def test_a_request_outlives_its_node(user):
    """Before anything is trained: both nodes hold the same weights, so the answer must be the same to the byte."""
    expected = user.chat("a long story", **LONG)["choices"][0]["message"]["content"]

    def serving():
        return [node.node_id for node in user.status().nodes if node.inflight_inference]

    with user.chat_stream("a long story", **LONG) as stream:
        chunks = [next(stream), next(stream)]
        (lost,) = eventually(serving, "a node has the request")
        user.cluster.child(lost).kill()
        chunks += list(stream)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length", chunks[-1]
    assert chunks[-1]["lemix"]["node_id"] != lost
    assert text_of(chunks) == expected
    eventually(lambda: sum(node.ready for node in user.status().nodes) == 1, "the loss is noticed")
    user.cluster.child(lost).start()
    eventually(user.all_ready, "the node is back")


def test_a_job_trains_to_its_end_while_requests_are_served(user):
    job_id = user.create_job(user.upload(24), epochs=2, lemix={"learning_rate": 1e-3})
    answers = 0

    def ended():
        nonlocal answers
        job = user.job_ended(job_id)
        if job is None:
            assert user.chat("still there?")["usage"]["completion_tokens"] >= 1
            answers += 1
        return job

    job = eventually(ended, "the job has ended")
    assert job["status"] == "succeeded", job
    assert job["lemix"]["trained_microbatches"] == job["lemix"]["total_microbatches"] == 48
    assert sum(job["lemix"]["steps_per_node"].values()) == 48
    assert job["lemix"]["last_loss"] < 5.5  # an untrained byte model is at ln(260) = 5.56
    assert answers >= 1
    steps = [version["step"] for version in user.chat("and now?")["lemix"]["weight_versions"]]
    assert steps[-1] >= 1  # what is served is what was trained


def test_feedback_is_learnt(user):
    lesson = {"prompt": "The capital of France is", "completion": " Paris."}
    losses = []
    for sequence in range(1, 4):
        response = user.http.post("/v1/feedback", json=lesson)
        assert response.status_code == 200, response.text
        job_id = response.json()["job_id"]

        def trained(job_id=job_id, sequence=sequence):
            job = user.job(job_id)
            return job if job["lemix"]["trained_microbatches"] >= sequence else None

        job = eventually(trained, "the example is trained")
        losses.append(job["lemix"]["last_loss"])
    assert sum(job["lemix"]["steps_per_node"].values()) == 3
    assert job["status"] == "running"  # it has no end
    assert losses[-1] < 5.5


def test_a_cancelled_job_stops(user):
    job_id = user.create_job(user.upload(40), epochs=100)
    response = user.http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
    assert response.status_code == 200, response.text
    job = eventually(lambda: user.job_ended(job_id), "the job has ended")
    assert job["status"] == "cancelled"
    assert job["lemix"]["trained_microbatches"] < 4000
    eventually(lambda: not any(node.inflight_training for node in user.status().nodes), "nothing is in flight")
    assert user.chat("next")["choices"]


def test_redis_away_and_back_loses_nothing(user):
    job_id = user.create_job(user.upload(40), epochs=3)
    total = user.job(job_id)["lemix"]["total_microbatches"]
    eventually(lambda: user.job(job_id)["lemix"]["trained_microbatches"] >= 1, "the job runs")
    user.cluster.redis.stop()
    try:
        eventually(lambda: user.http.get("/readyz").status_code == 503, "the gateway is not ready")
        with httpx.Client(base_url=user.cluster.url, timeout=PATIENCE_S, trust_env=False) as impatient:
            refused = impatient.post("/v1/completions", json={"model": user.model, "prompt": "x", "max_tokens": 1})
        assert refused.status_code == 503, refused.text
        assert refused.json()["error"]["code"] == "unavailable"
    finally:
        user.cluster.redis.start()
    eventually(user.all_ready, "ready again")
    assert user.chat("back?")["choices"]
    job = eventually(lambda: user.job_ended(job_id), "the job has ended", 60)
    assert job["status"] == "succeeded", job
    assert job["lemix"]["trained_microbatches"] == total == 120


def test_the_scheduler_may_be_replaced(user):
    job_id = user.create_job(user.upload(20), epochs=2)
    user.cluster.child("scheduler").kill()
    eventually(lambda: user.http.get("/readyz").status_code == 503, "the gateway is not ready")
    user.cluster.child("scheduler").start()
    eventually(user.all_ready, "ready again")
    job = eventually(lambda: user.job_ended(job_id), "the job has ended")
    assert (job["status"], job["lemix"]["trained_microbatches"]) == ("succeeded", 40)
    assert user.chat("and you?")["choices"]


def test_a_service_stopped_by_its_operator_ends_in_order(user):
    child = user.cluster.child("node-1")
    workers = child.descendants()
    os.kill(child.pid, signal.SIGTERM)
    assert eventually(lambda: child.exit_code is not None, "the node has ended")
    assert child.exit_code == 0, child.tail()
    assert workers
    eventually(lambda: not any(worker.is_running() for worker in workers), "its stage workers have ended")
    assert user.chat("still there?")["lemix"]["node_id"] == "node-0"
    child.start()
    eventually(user.all_ready, "the node is back")
