"""A job is paused, cancelled and taken up again on a real node, and trains every micro-batch once."""

import pytest
from cluster_under_test import eventually, running

from deploy.local.settings import LocalClusterConfig


@pytest.fixture(scope="module")
def user(model, profiles, tmp_path_factory):
    config = LocalClusterConfig(
        model_path=model,
        directory=tmp_path_factory.mktemp("run"),
        num_nodes=1,
        num_stages=2,
        profiles_directory=profiles,
        node={"checkpoint_directory": str(tmp_path_factory.mktemp("checkpoints")), "checkpoint_every_s": 3600},
        profiler={"repetitions": 2},
    )
    with running(config) as user:
        yield user


@pytest.mark.timeout(300)
def test_a_job_that_is_paused_and_cancelled_goes_on(user):
    def ask(what):
        return user.http.post(f"/v1/fine_tuning/jobs/{job_id}/{what}").json()["status"]

    def trained(at_least):
        return user.job(job_id)["lemix"]["trained_microbatches"] >= at_least

    job_id = user.create_job(user.upload(12), epochs=20)
    eventually(lambda: trained(3), "it has begun")
    assert ask("pause") == "paused"

    def saved():
        held = user.http.get(f"/v1/fine_tuning/jobs/{job_id}/checkpoints").json()["data"]
        return [found for found in held if found["reason"] == "pause"]

    (checkpoint,) = eventually(saved, "its node has saved")
    at_pause = user.job(job_id)["lemix"]["trained_microbatches"]
    assert checkpoint["trained_microbatches"] == {job_id: at_pause}
    assert ask("resume") == "running"
    eventually(lambda: trained(at_pause + 3), "it goes on")
    assert ask("cancel") == "cancelled"
    assert ask("resume") == "running"
    job = eventually(lambda: user.job_ended(job_id), "the job has ended")
    assert (job["status"], job["lemix"]["trained_microbatches"]) == ("succeeded", 240)
    assert user.http.post(f"/v1/fine_tuning/jobs/{job_id}/resume").status_code == 409
