"""One node in two pipeline stages, with real weights."""

import pytest
from cluster_under_test import eventually, metric, running

from deploy.local.ports import pick_free
from deploy.local.settings import LocalClusterConfig


@pytest.fixture(scope="module")
def metrics_port():
    return pick_free(1)[0]


@pytest.fixture(scope="module")
def user(model, profiles, metrics_port, tmp_path_factory):
    config = LocalClusterConfig(
        model_path=model,
        directory=tmp_path_factory.mktemp("run"),
        num_nodes=1,
        num_stages=2,
        profiles_directory=profiles,
        node={"metrics_port": metrics_port},
        profiler={"repetitions": 2},
    )
    with running(config) as user:
        yield user


def test_two_stages_run_and_are_shown(user):
    (node,) = user.status().nodes
    assert node.num_stages == 2
    assert len(user.cluster.child("node-0").descendants()) >= 2
    names = set(user.cluster.processes())
    assert {"redis", "profiler", "scheduler", "node-0", "node-0/0", "node-0/1", "gateway"} <= names


def test_serving_and_training_go_through_both(user):
    before = user.chat("Hello", temperature=0, max_tokens=16)
    stale = user.post_chat("Hello", max_tokens=4, lemix={"max_staleness_s": 3600})
    assert (stale.status_code, stale.json()["error"]["code"]) == (412, "stale_weights")
    assert "none were ever trained" in stale.json()["error"]["message"]
    assert before["usage"]["completion_tokens"] >= 1
    job_id = user.create_job(user.upload(12), epochs=2, lemix={"learning_rate": 1e-3})
    job = eventually(lambda: user.job_ended(job_id), "the job has ended")
    assert job["status"] == "succeeded", job
    assert job["lemix"]["steps_per_node"] == {"node-0": 24}
    (version,) = user.chat("Hello", temperature=0)["lemix"]["weight_versions"]
    assert (version["step"], version["job_id"]) == (24, job_id)
    fresh = user.chat("Hello", max_tokens=4, lemix={"max_staleness_s": 3600})
    assert 0 <= fresh["lemix"]["staleness_s"] <= 3600


def test_choices_are_reproducible_one_by_one(user):
    """Choice i of a seed is what seed + i gives alone, whatever runs beside it."""
    asked = {"max_tokens": 24, "temperature": 1, "min_tokens": 4, "presence_penalty": 0.5, "logprobs": True}
    answer = user.chat("Once", n=3, seed=40, top_logprobs=2, **asked)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    for index, choice in enumerate(answer["choices"]):
        alone = user.chat("Once", seed=40 + index, **asked)["choices"][0]
        assert choice["message"] == alone["message"]
        told = [(item["token"], item["logprob"]) for item in choice["logprobs"]["content"]]
        assert [token for token, _ in told] == [item["token"] for item in alone["logprobs"]["content"]]
        assert len(told) >= 4
        assert all(logprob <= 0 for _, logprob in told)
    counted = sum(len(choice["logprobs"]["content"]) for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == counted


def test_a_stop_string_ends_the_request_on_the_node(user, metrics_port):
    asked = {"max_tokens": 200, "temperature": 1, "seed": 3, "ignore_eos": True}
    whole = user.chat("Once", **asked)["choices"][0]["message"]["content"]
    stop = whole[20:24]
    cancelled = metric(metrics_port, "lemix_node_tasks_total", kind="inference", reason="cancelled")
    cut = user.chat("Once", stop=[stop], **asked)["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == (whole[: whole.index(stop)], "stop")
    shown = user.chat("Once", stop=[stop], include_stop_str_in_output=True, **asked)["choices"][0]
    assert shown["message"]["content"] == whole[: whole.index(stop)] + stop
    assert metric(metrics_port, "lemix_node_tasks_total", kind="inference", reason="cancelled") == cancelled


def test_a_client_that_hangs_up_frees_what_it_held(user, metrics_port):
    cancelled = metric(metrics_port, "lemix_node_tasks_total", kind="inference", reason="cancelled")
    with user.chat_stream("a very long story", max_tokens=900, temperature=1, seed=7, ignore_eos=True) as stream:
        next(stream)
        next(stream)
        # Leaving the block closes the connection with most of the tokens to come.

    def now_cancelled():
        return metric(metrics_port, "lemix_node_tasks_total", kind="inference", reason="cancelled") == cancelled + 1

    eventually(now_cancelled, "the node has dropped the request")
    eventually(lambda: metric(metrics_port, "lemix_node_kv_used_tokens") == 0, "its KV cache is free")
    assert user.status().nodes[0].inflight_inference == 0
    assert user.chat("next")["choices"]
