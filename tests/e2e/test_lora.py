"""An adapter is trained, served as a model of its own beside the model that it leaves alone, and deleted."""

from pathlib import Path

import pytest
from cluster_under_test import eventually, running
from safetensors.numpy import load_file

from deploy.local.settings import LocalClusterConfig

TRAINING = {"learning_rate": 5e-2, "kind": "isolated", "method": "lora"}


@pytest.fixture(scope="module")
def user(model, profiles, tmp_path_factory):
    config = LocalClusterConfig(
        model_path=model,
        directory=tmp_path_factory.mktemp("run"),
        num_nodes=1,
        num_stages=2,
        profiles_directory=profiles,
        node={"checkpoint_directory": str(tmp_path_factory.mktemp("checkpoints"))},
        profiler={"repetitions": 2},
    )
    with running(config) as user:
        yield user


def models(user):
    return {model["id"]: model.get("parent") for model in user.http.get("/v1/models").json()["data"]}


def answered(user, text, **values):
    response = user.post_chat(text, **values)
    return response.json() if response.status_code == 200 else None


@pytest.mark.timeout(300)
def test_an_isolated_job(user):
    asked = {"temperature": 0, "max_tokens": 24}
    before = user.chat("the cat", **asked)
    lora = {"rank": 4, "alpha": 8, "target_modules": ["all-linear"]}
    job_id = user.create_job(user.upload(12), epochs=3, lemix={**TRAINING, "lora": lora})
    served = f"{user.model}:{job_id}"
    assert user.job(job_id)["lemix"]["served_model"] == served
    eventually(lambda: served in models(user), "its model is listed while it trains")
    job = eventually(lambda: user.job_ended(job_id), "the job has ended")
    assert (job["status"], job["fine_tuned_model"]) == ("succeeded", served), job
    assert job["lemix"]["lora"] == {"dropout": 0.0, **lora}
    assert models(user) == {user.model: None, served: user.model}
    assert user.http.get(f"/v1/models/{served}").json()["parent"] == user.model

    own = user.chat("the cat", model=served, **asked)
    assert own["model"] == served
    assert own["choices"] != before["choices"]
    assert {version["job_id"] for version in own["lemix"]["weight_versions"]} == {job_id}
    after = user.chat("the cat", **asked)
    assert (after["model"], after["choices"]) == (user.model, before["choices"])
    assert {version["job_id"] for version in after["lemix"]["weight_versions"]} == {None}
    # Nothing that serves the model itself was trained.
    assert user.post_chat("x", lemix={"max_staleness_s": 3600}).json()["error"]["code"] == "stale_weights"
    of_adapter = user.post_chat("x", model=served, lemix={"max_staleness_s": 3600})
    assert (of_adapter.status_code, of_adapter.json()["error"]["param"]) == (400, "max_staleness_s")

    # Adapter, optimizer and job survive the node; the weights below were never written.
    newest = user.http.get(f"/v1/fine_tuning/jobs/{job_id}/checkpoints").json()["data"][0]
    assert newest["trained_microbatches"] == {job_id: 36}
    path = user.http.post(f"/v1/checkpoints/{newest['id']}/export", params={"job_id": job_id}).json()["path"]
    assert len(load_file(f"{path}/adapter_model.safetensors")) == 4 * 7 * 2
    assert list(Path(path).parents[1].glob("node-0/*/model-*")) == []
    user.cluster.child("node-0").kill()
    user.cluster.child("node-0").start()
    eventually(lambda: served in models(user), "the node is back with the adapter", 90)
    again = eventually(lambda: answered(user, "the cat", model=served, **asked), "it serves again", 90)
    assert again["choices"] == own["choices"]

    assert user.http.delete(f"/v1/models/{served}").json() == {"id": served, "object": "model", "deleted": True}
    eventually(lambda: models(user) == {user.model: None}, "its model is not listed any more")
    refused = user.post_chat("the cat", model=served, **asked)
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    assert user.http.delete(f"/v1/models/{served}").status_code == 200
    assert user.job(job_id)["fine_tuned_model"] is None


def test_an_online_adapter_updates_the_served_model(user):
    asked = {"temperature": 0, "max_tokens": 24}
    before = user.chat("the cat", **asked)
    job_id = user.create_job(user.upload(12), epochs=3, lemix={**TRAINING, "kind": "online"})
    job = eventually(lambda: user.job_ended(job_id), "the job has ended")
    assert (job["status"], job["fine_tuned_model"]) == ("succeeded", user.model), job
    assert job["lemix"]["lora"]["rank"] == 8
    after = user.chat("the cat", **asked)
    assert after["choices"] != before["choices"]
    assert {version["job_id"] for version in after["lemix"]["weight_versions"]} == {job_id}
    assert models(user) == {user.model: None}


def test_cancelling_an_isolated_job_frees_its_model(user):
    job_id = user.create_job(user.upload(40), epochs=100, lemix=TRAINING)
    served = f"{user.model}:{job_id}"
    eventually(lambda: served in models(user), "its model is listed")
    with user.chat_stream("the cat", model=served, max_tokens=900, ignore_eos=True) as chunks:
        next(chunks)
        conflict = user.http.delete(f"/v1/models/{served}")
        assert (conflict.status_code, conflict.json()["error"]["code"]) == (409, "conflict")
        assert user.http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").json()["status"] == "cancelled"
        assert len(list(chunks)) < 900  # it ends with its model
    eventually(lambda: models(user) == {user.model: None}, "its model is not listed any more")
    assert user.job(job_id)["lemix"]["served_model"] is None


@pytest.mark.parametrize(
    ("lemix", "param"),
    [
        ({"kind": "isolated"}, "mode"),
        ({"method": "full", "lora": {"rank": 4}}, "lora"),
        ({"method": "lora", "lora": {"rank": 0}}, "lora.rank"),
        ({"method": "lora", "lora": {"alpha": -1}}, "lora.alpha"),
        ({"method": "lora", "lora": {"dropout": 1}}, "lora.dropout"),
        ({"method": "lora", "lora": {"target_modules": ["q_proj; rm"]}}, "lora.target_modules"),
        ({"method": "lora", "lora": {"target_modules": ["q_proj", "c_attn"]}}, "lora.target_modules"),
    ],
)
def test_what_no_adapter_is_gets_told(user, lemix, param):
    body = {"model": user.model, "training_file": user.upload(2), "lemix": lemix}
    response = user.http.post("/v1/fine_tuning/jobs", json=body)
    assert response.status_code == 400
    assert (response.json()["error"]["code"], response.json()["error"]["param"]) == ("invalid_request", param)


def test_models_that_nobody_trained_are_refused(user):
    for model in (f"{user.model}:job-unknown", f"{user.model}:", "other:job-1"):
        refused = user.post_chat("x", model=model)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found"), model
    assert user.http.delete(f"/v1/models/{user.model}").status_code == 409
