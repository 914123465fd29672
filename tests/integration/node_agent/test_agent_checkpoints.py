"""Checkpoints of a running node: when they are written, what they cover, and what is trained again."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from lemix.internal.v1 import scheduler_service_pb2 as scheduler_pb2
from lemix.v1 import errors_pb2
from services.ledger import TaskState, open_ledger
from services.node_agent.checkpoint_files import weights_files
from tests.integration.node_agent.checkpoint_life import (
    Away,
    Disk,
    Jitter,
    after_steps,
    command,
    life,
    newest,
    states,
    train,
    train_and_save,
    trained,
    weights,
)
from tests.integration.node_agent.harness import (
    cluster,
    inference_item,
)


async def test_an_end_waits_for_a_checkpoint(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made, life(made, tmp_path / "saved", checkpoint_every_steps=3) as node:
        assert made.scheduler.hellos[0].keeps_checkpoints
        await train(made, [0, 1])
        await trained(made, 2)
        assert await states(made, 2) == [TaskState.ASSIGNED] * 2
        await train(made, [2])
        report = await made.scheduler.checkpoint(1)
        assert await made.scheduler.outcome("job/2")
        assert await states(made, 3) == [TaskState.DONE] * 3
        version = node.agent.incarnation
        assert report.checkpoint.checkpoint_id == f"node-0:{version}:3"
        assert dict(report.checkpoint.trained_microbatches) == {"job": 3}
        assert report.checkpoint.reason == "interval"
        assert [held.checkpoint_id for held in report.held] == [report.checkpoint.checkpoint_id]


async def test_the_interval_of_the_job_counts(tmp_path: Path) -> None:
    every_second = {"checkpoint": {"every_steps": 2}}
    async with cluster(tmp_path) as made, life(made, tmp_path / "saved", checkpoint_every_steps=100):
        await train(made, [0, 1], **every_second)
        assert (await made.scheduler.checkpoint(1)).checkpoint.trained_microbatches["job"] == 2


async def test_time_alone_brings_a_checkpoint(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made, life(made, tmp_path / "saved", checkpoint_every_s=0.05):
        await train(made, [0])
        assert (await made.scheduler.checkpoint(1)).checkpoint.trained_microbatches["job"] == 1


async def test_a_killed_node_trains_again_what_its_checkpoint_lacks(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        async with life(made, tmp_path / "saved", checkpoint_every_steps=2) as node:
            await train_and_save(made, 5)
            await made.scheduler.outcome("job/3")
            before = node.agent.incarnation
        async with life(made, tmp_path / "saved", checkpoint_every_steps=2) as node:
            hello = made.scheduler.hellos[-1]
            assert [held.checkpoint_id for held in hello.checkpoints] == [f"node-0:{before}:4", f"node-0:{before}:2"]
            assert hello.incarnation > before
            assert hello.restore_note == ""
            await trained(made, 6)
            assert made.scheduler.trained == [f"job/{sequence}" for sequence in (0, 1, 2, 3, 4, 4)]
            assert weights(node) == pytest.approx([after_steps(5)] * 2)
            await train(made, [5])
            assert await made.scheduler.outcome("job/5")
            assert weights(node) == pytest.approx([after_steps(6)] * 2)


async def test_a_node_killed_before_the_ledger_knew_does_not_train_again(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        ledger = Away(await open_ledger(made.ledger_url))
        async with life(made, tmp_path / "saved", checkpoint_every_steps=2, ledger=ledger):
            await train_and_save(made, 3)
        assert await states(made, 3) == [TaskState.ASSIGNED] * 3
        async with life(made, tmp_path / "saved", checkpoint_every_steps=1) as node:
            for sequence in range(3):
                assert (await made.scheduler.outcome(f"job/{sequence}")).training.HasField("loss")
            assert made.scheduler.trained == ["job/0", "job/1", "job/2", "job/2"]
            assert weights(node) == pytest.approx([after_steps(3)] * 2)


async def test_no_more_is_trained_than_a_crash_may_cost(tmp_path: Path) -> None:
    disk = Disk()
    disk.full = True
    async with (
        cluster(tmp_path) as made,
        life(made, tmp_path / "saved", max_unsaved_microbatches=2, tamper=disk) as node,
    ):
        await train(made, [0, 1])
        await made.scheduler.checkpoint(1)
        await train(made, [2, 3])
        await made.assign(inference_item("r", [1], 1))  # read after them
        await made.scheduler.outcome("r")
        assert made.scheduler.trained == ["job/0", "job/1"]
        made.scheduler.command("node-0", cancel=scheduler_pb2.CancelWork(task_id="job/3"))
        assert (await made.scheduler.outcome("job/3")).training.error.code == errors_pb2.ERROR_CODE_CANCELLED
        disk.full = False
        command(made, save="request")
        await trained(made, 3)
        assert weights(node) == pytest.approx([after_steps(3)] * 2)


async def test_a_cancelled_micro_batch_makes_room_without_a_checkpoint(tmp_path: Path) -> None:
    disk = Disk()
    disk.full = True
    async with cluster(tmp_path) as made, life(made, tmp_path / "saved", max_unsaved_microbatches=1, tamper=disk):
        await train(made, [0])
        await made.scheduler.checkpoint(1)
        await train(made, [1])
        await made.assign(inference_item("r", [1], 1))  # read after it
        await made.scheduler.outcome("r")
        assert made.scheduler.trained == ["job/0"]
        made.scheduler.command("node-0", cancel=scheduler_pb2.CancelWork(task_id="job/0"))
        await trained(made, 2)
        assert made.scheduler.trained == ["job/0", "job/1"]


async def test_a_node_that_is_told_to_stop_saves_first(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        async with life(made, tmp_path / "saved") as node:
            await train(made, [0, 1, 2])
            await trained(made, 3)
            await node.agent.drain()
        assert await states(made, 3) == [TaskState.DONE] * 3
        manifest = json.loads((newest(tmp_path / "saved") / "manifest.json").read_text())["manifest"]
        assert (manifest["reason"], manifest["step"], manifest["positions"]) == ("shutdown", 3, {"job": [[0, 2]]})


async def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made, life(made, tmp_path / "saved", checkpoint_every_steps=1, checkpoint_keep=2):
        for sequence in range(4):
            await train(made, [sequence])
            report = await made.scheduler.checkpoint(sequence + 1)
        assert [held.checkpoint_id.rsplit(":", 1)[1] for held in report.held] == ["4", "3"]
        assert len(list((tmp_path / "saved" / "node-0").iterdir())) == 2


async def test_a_new_session_tells_again_what_is_in_no_checkpoint(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made, life(made, tmp_path / "saved"):
        await train(made, [0, 1])
        await trained(made, 2)
        await made.scheduler.stop()
        await made.scheduler.start()
        await trained(made, 4)
        assert made.scheduler.trained == ["job/0", "job/1"] * 2


async def test_a_node_without_a_folder_for_them_keeps_no_checkpoints(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        await made.start_node()
        assert not made.scheduler.hellos[0].keeps_checkpoints
        command(made, save="request")
        assert (await made.scheduler.checkpoint(1)).error.code == errors_pb2.ERROR_CODE_CONFLICT
        await train(made, [0])
        assert await made.scheduler.outcome("job/0")


async def test_a_checkpoint_that_is_kept_outlives_newer_ones(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made, life(made, tmp_path / "saved", checkpoint_every_steps=1, checkpoint_keep=1):

        async def keep(checkpoint_id: str, reports: int) -> scheduler_pb2.CheckpointReport:
            """Commands take turns, and a node does not say that it keeps one: the answer to the next says so."""
            wanted = scheduler_pb2.KeepCheckpoint(job_id="job", checkpoint_id=checkpoint_id)
            made.scheduler.command("node-0", checkpoint=scheduler_pb2.CheckpointCommand(keep=wanted))
            command(made, save="request")
            return await made.scheduler.checkpoint(reports)

        await train(made, [0])
        best = (await made.scheduler.checkpoint(1)).checkpoint.checkpoint_id
        assert not (await keep(best, 2)).HasField("error")
        for sequence in (1, 2):
            await train(made, [sequence])
            report = await made.scheduler.checkpoint(sequence + 2)
        newest_id = report.checkpoint.checkpoint_id
        assert [held.checkpoint_id for held in report.held] == [newest_id, best]
        assert [held.checkpoint_id for held in (await keep("", 5)).held] == [newest_id]


@pytest.mark.parametrize("handling", ["drain", "stash"])
async def test_all_stages_save_one_version_while_training_and_serving_go_on(tmp_path: Path, handling: str) -> None:
    settings = {"checkpoint_every_steps": 1, "checkpoint_keep": 100, "num_stages": 3, "weight_handling": handling}
    async with cluster(tmp_path) as made, life(made, tmp_path / "saved", gate=Jitter(), **settings):
        await train(made, range(30))
        for index in range(5):
            await made.assign(inference_item(f"r{index}", [1, 2], 20))
        await trained(made, 30)
        assert await made.scheduler.outcome("job/29")
        for index in range(5):
            outcome = (await made.scheduler.outcome(f"r{index}")).inference
            assert len(outcome.token_ids) == 20
        assert not any(report.HasField("error") for report in made.scheduler.checkpoints)
    folders = list((tmp_path / "saved" / "node-0").glob("[0-9]*"))
    assert len(folders) >= 2
    for folder in folders:
        manifest = json.loads((folder / "manifest.json").read_text())["manifest"]
        assert manifest["positions"]["job"] == [[0, manifest["step"] - 1]]
        values = [value.mean() for file in weights_files(folder) for value in load_file(file).values()]
        assert values == pytest.approx([after_steps(manifest["step"])] * 3)
