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
    assert before["usage"]["completion_tokens"] >= 1
    job_id = user.create_job(user.upload(12), epochs=2, lemix={"learning_rate": 1e-3})
    job = eventually(lambda: user.job_ended(job_id), "the job has ended")
    assert job["status"] == "succeeded", job
    assert job["lemix"]["steps_per_node"] == {"node-0": 24}
    (version,) = user.chat("Hello", temperature=0)["lemix"]["weight_versions"]
    assert version.endswith(":24")


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
