"""A node killed in the middle of a job: its final weights are those of a run that was never interrupted."""

import asyncio
import re

import numpy as np
import pytest
from cluster_under_test import eventually, running
from safetensors.numpy import load_file
from uninterrupted import final_weights

import lemix
from deploy.local.settings import LocalClusterConfig
from services.ledger import open_ledger
from services.scheduler.feeder import shuffled

EXAMPLES = 40
HYPERPARAMETERS = lemix.Hyperparameters(
    learning_rate=1e-3, num_epochs=2, gradient_accumulation_steps=2, lr_schedule="cosine", warmup_steps=4
)


@pytest.fixture(params=[pytest.param(1, marks=pytest.mark.slow, id="one stage"), pytest.param(2, id="two stages")])
def user(request, model, profiles, tmp_path):
    config = LocalClusterConfig(
        model_path=model,
        directory=tmp_path / "run",
        num_nodes=1,
        num_stages=request.param,
        profiles_directory=profiles,
        node={"checkpoint_directory": str(tmp_path / "checkpoints"), "dtype": "float64"},
        scheduler={"node_lease_s": 5.0},
        profiler={"repetitions": 2},
    )
    with running(config) as user:
        yield user


async def examples_in_order(redis_url, job):
    """The job's micro-batches as they are trained: of one example each, an order per epoch."""
    ledger = await open_ledger(redis_url)
    try:
        positions = [
            position
            for epoch in range(HYPERPARAMETERS.num_epochs)
            for position in shuffled(job.job_id, epoch, job.num_examples)
        ]
        return await ledger.read_examples(job.training_file, positions)
    finally:
        await ledger.close()


def times_trained_again(user, job_id):
    """By loss of the node: micro-batches that its checkpoint lacked."""
    events = user.http.get(f"/v1/fine_tuning/jobs/{job_id}/events?limit=1000").json()["data"]
    told = [re.match(r"node-0 was lost: (\d+) micro-batches", event["message"]) for event in reversed(events)]
    return [int(match[1]) for match in told if match]


@pytest.mark.timeout(400)  # the node starts three times
def test_a_killed_node_trains_again_what_its_checkpoint_lacks(user):
    with lemix.Client(user.cluster.grpc_address) as client:
        job = client.create_job(
            user.upload(EXAMPLES),
            hyperparameters=HYPERPARAMETERS,
            checkpoint=lemix.CheckpointPolicy(every_steps=7),
        )
        for progress in (23, 51):

            def trained(least=progress):
                seen = client.get_job(job.job_id)
                return seen.trained_microbatches >= least and seen

            eventually(trained, f"{progress} micro-batches are trained", 90)
            user.cluster.child("node-0").kill()
            user.cluster.child("node-0").start()
        ended = eventually(lambda: user.job_ended(job.job_id), "the job has ended", 120)
        assert ended["status"] == "succeeded", ended
        assert ended["lemix"]["trained_microbatches"] == 2 * EXAMPLES
        assert ended["lemix"]["unsaved_microbatches"] == 0
        newest = client.list_checkpoints(job.job_id)[0]
        assert newest.trained_microbatches[job.job_id] == 2 * EXAMPLES
        exported = client.export_checkpoint(newest.checkpoint_id)
    again = times_trained_again(user, job.job_id)
    assert len(again) >= 2  # a busy machine may cut a session of its own
    assert sum(again) > 0
    order = asyncio.run(examples_in_order(user.cluster.redis_url, job))
    assert len(order) == 2 * EXAMPLES
    expected = final_weights(user.cluster.config.model_path, order, job.hyperparameters)
    found = load_file(f"{exported.path}/model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = np.linalg.norm(found[name] - value) / np.linalg.norm(value)
        assert error <= 1e-6, (name, error)
