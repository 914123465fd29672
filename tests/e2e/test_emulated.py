"""An emulated A100 with all services: serves and trains, moves what does not fit, and counts how well it keeps time."""

import pytest
from cluster_under_test import eventually, metric, running

from bench.live.emulated import MODEL_NAME, PROFILES, clock_slip, emulated_cluster
from deploy.local.ports import pick_free

#: Room for one micro-batch of these examples on a stage, not for two.
MEMORY_BYTES = 2 << 30
EXAMPLE_CHARACTERS = 500


@pytest.fixture
def metrics_port():
    return pick_free(1)[0]


@pytest.fixture
def config(tmp_path, metrics_port):
    return emulated_cluster(
        tmp_path / "run",
        profiles=(PROFILES / "a100-llama-2-7b.json",),
        time_scale=0.5,
        node={
            "metrics_port": metrics_port,
            "stage_memory_bytes": MEMORY_BYTES,
            "memory_max_wait_s": 0.0,
            "memory_max_forward_wait_s": 0.0,
        },
    )


def test_an_emulated_node_serves_trains_and_offloads(config, metrics_port):
    with running(config) as user:
        user.model = MODEL_NAME
        # Four micro-batches per step: two of them are in flight at a time.
        together = {"gradient_accumulation_steps": 4}
        job_id = user.create_job(user.upload(8, length=EXAMPLE_CHARACTERS), epochs=2, lemix=together)
        answer = user.chat("Hello", max_tokens=20, ignore_eos=True)
        assert answer["usage"]["completion_tokens"] == 20
        job = eventually(lambda: user.job_ended(job_id), "the job has ended")
        assert job["status"] == "succeeded", job
        moved = {op: metric(metrics_port, "lemix_node_ops_total", op=op, result="ok") for op in ("offload", "reload")}
        assert moved["offload"] > 0
        assert moved["reload"] > 0
        failed = metric(metrics_port, "lemix_node_ops_total", result="error")
        assert not failed
    slip = clock_slip(config.directory)
    assert slip.ops > 40
    assert 0.0 < slip.p50 <= slip.p99
