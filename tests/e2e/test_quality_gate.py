"""Held-out losses of a real model: the best checkpoint is published, and a job that spoils the model is undone."""

import pytest
from cluster_under_test import eventually, running

import lemix
from deploy.local.settings import LocalClusterConfig


@pytest.fixture
def user(model, profiles, tmp_path):
    config = LocalClusterConfig(
        model_path=model,
        directory=tmp_path / "run",
        num_nodes=2,
        policy="separate",
        profiles_directory=profiles,
        node={"checkpoint_directory": str(tmp_path / "checkpoints")},
        profiler={"repetitions": 2},
    )
    with running(config) as user:
        yield user


def messages(user, job_id):
    events = user.http.get(f"/v1/fine_tuning/jobs/{job_id}/events?limit=1000").json()["data"]
    return [event["message"] for event in reversed(events)]


@pytest.mark.timeout(300)
def test_what_gets_better_is_published_and_what_gets_worse_is_undone(user):
    with lemix.Client(user.cluster.grpc_address) as client:
        heldout = user.upload(4)
        good = client.create_job(
            user.upload(20),
            hyperparameters=lemix.Hyperparameters(learning_rate=1e-3, num_epochs=2),
            checkpoint=lemix.CheckpointPolicy(every_steps=10),
            validation_file=heldout,
            quality_gate=lemix.QualityGate(publish=True),
        )
        published = eventually(
            lambda: [text for text in messages(user, good.job_id) if "took over checkpoint" in text], "published", 90
        )
        assert published[0].startswith(("node-0 took over", "node-1 took over"))
        eventually(lambda: user.job_ended(good.job_id), "the job has ended", 90)
        versions = user.chat("Hello", temperature=0)["lemix"]["weight_versions"]
        assert versions[-1]["step"] > 0, "the serving node has never trained: what it serves was published"
        best = eventually(lambda: client.get_job(good.job_id).best_heldout_loss, "a held-out loss", 90)
        assert best < 5.5  # an untrained byte model is at ln(260) = 5.56

        bad = client.create_job(
            user.upload(40),
            # Long enough that its rate does not fall, and the model recover, before it is measured.
            hyperparameters=lemix.Hyperparameters(learning_rate=0.5, num_epochs=100),
            checkpoint=lemix.CheckpointPolicy(every_steps=5),
            validation_file=heldout,
            quality_gate=lemix.QualityGate(tolerance=0.5, max_bad_evaluations=1),
        )
        eventually(lambda: any("went back to checkpoint" in text for text in messages(user, bad.job_id)), "undone", 90)
        client.cancel_job(bad.job_id)
        before = client.list_checkpoints(good.job_id)
        assert {checkpoint.reason for checkpoint in before} & {"rollback"}
