"""Checkpoints that went wrong: spoiled, of another model, on a full disk, or of a node that was killed."""

import asyncio
import errno
import json
import random
from pathlib import Path

import pytest

from lemix.v1 import errors_pb2
from services.ledger import TaskState
from services.node_agent.checkpoint_files import weights_files
from services.runtime.app import StartupError
from tests.integration.node_agent.checkpoint_life import (
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
    two_checkpoints,
    weights,
)
from tests.integration.node_agent.harness import (
    Gate,
    cluster,
    write_model,
)


async def test_a_corrupted_checkpoint_is_not_used_and_that_is_said(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        await two_checkpoints(made, tmp_path / "saved")
        broken = newest(tmp_path / "saved")
        file = weights_files(broken)[0]
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        async with life(made, tmp_path / "saved") as node:
            hello = made.scheduler.hellos[-1]
            assert f"checkpoint {broken.name} is corrupted, it started from node-0:" in hello.restore_note
            assert "2 of job" in hello.restore_note
            assert weights(node) == pytest.approx([after_steps(2)] * 2)
            assert len(hello.checkpoints) == 1
        assert not broken.exists()
        assert broken.with_name(f".corrupted-{broken.name}").is_dir()


async def test_a_checkpoint_without_a_readable_manifest_is_not_used(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        await two_checkpoints(made, tmp_path / "saved")
        (newest(tmp_path / "saved") / "manifest.json").write_text('{"format": 1}')
        async with life(made, tmp_path / "saved") as node:
            assert "its list of micro-batches is corrupted as well" in made.scheduler.hellos[-1].restore_note
            assert weights(node) == pytest.approx([after_steps(2)] * 2)


async def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        await two_checkpoints(made, tmp_path / "saved")
        write_model(made.model, num_hidden_layers=6)
        with pytest.raises(StartupError, match="is of another model: num_hidden_layers is 4, here 6; name another"):
            async with life(made, tmp_path / "saved"):
                pass


async def test_a_full_disk_is_reported_and_the_job_goes_on(tmp_path: Path) -> None:
    disk = Disk()
    async with cluster(tmp_path) as made, life(made, tmp_path / "saved", checkpoint_every_steps=2, tamper=disk):
        await train(made, [0, 1])
        first = (await made.scheduler.checkpoint(1)).checkpoint
        disk.full = True
        await train(made, range(2, 7))
        report = await made.scheduler.checkpoint(2)
        assert report.error.code == errors_pb2.ERROR_CODE_RESOURCE_EXHAUSTED
        assert "No space left on device" in report.error.message
        assert [held.checkpoint_id for held in report.held] == [first.checkpoint_id]
        await trained(made, 7)
        assert await states(made, 7) == [TaskState.DONE] * 2 + [TaskState.ASSIGNED] * 5
        assert not list((tmp_path / "saved" / "node-0").glob(".partial*"))
        disk.full = False
        command(made, save="request")
        report = await made.scheduler.checkpoint(3)
        assert report.request_id == "request"
        assert report.checkpoint.trained_microbatches["job"] == 7
        assert await made.scheduler.outcome("job/6")


async def test_training_does_not_stop_for_ever_because_of_a_full_disk(tmp_path: Path) -> None:
    disk = Disk()
    disk.full = True
    settings = {"checkpoint_every_steps": 2, "checkpoint_give_up_s": 0.0, "tamper": disk}
    async with cluster(tmp_path) as made, life(made, tmp_path / "saved", **settings):
        await train(made, [0, 1])
        assert (await made.scheduler.checkpoint(1)).HasField("error")
        assert not (await made.scheduler.outcome("job/1")).training.HasField("error")


async def test_a_node_killed_while_it_saves_has_the_one_before(tmp_path: Path) -> None:
    gate = Gate()
    async with cluster(tmp_path) as made:
        async with life(made, tmp_path / "saved", checkpoint_every_steps=2, gate=gate, num_stages=1):
            await train(made, [0, 1])
            await made.scheduler.outcome("job/1")
            await train(made, [2])
            await trained(made, 3)
            gate.close()
            command(made, save="request")
            await gate.until_waiting()
            # As after a kill: the half-written folder is there, and nobody cleans it up.
            (tmp_path / "saved" / "node-0" / ".partial-killed").mkdir()
        assert list((tmp_path / "saved" / "node-0").glob(".partial*"))
        async with life(made, tmp_path / "saved", num_stages=1) as node:
            assert not list((tmp_path / "saved" / "node-0").glob(".partial*"))
            assert len(made.scheduler.hellos[-1].checkpoints) == 1
            await trained(made, 4)
            assert made.scheduler.trained[3:] == ["job/2"]
            assert weights(node) == pytest.approx([after_steps(3)])


async def test_a_disk_that_is_full_when_it_is_flushed_leaves_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with cluster(tmp_path) as made, life(made, tmp_path / "saved", checkpoint_every_steps=2):
        await train_and_save(made, 2)
        first = (await made.scheduler.checkpoint(1)).checkpoint.checkpoint_id
        with monkeypatch.context() as patched:
            patched.setattr("os.fsync", full)
            await train(made, [2, 3])
            report = await made.scheduler.checkpoint(2)
        assert report.error.message == "cannot write a checkpoint: No space left on device"
        assert [held.checkpoint_id for held in report.held] == [first]
        assert not list((tmp_path / "saved" / "node-0").glob(".partial*"))
        command(made, save="request")
        assert (await made.scheduler.checkpoint(3)).checkpoint.trained_microbatches["job"] == 4


@pytest.mark.parametrize("seed", range(6))
async def test_however_often_a_node_is_killed_every_step_is_in_its_weights_once(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    count = 20
    settings = {
        "checkpoint_every_steps": chance.choice([1, 3]),
        "num_stages": chance.choice([1, 3]),
        "weight_handling": chance.choice(["drain", "stash"]),
    }
    async with cluster(tmp_path) as made:
        await train(made, range(count))
        for _ in range(8):
            async with life(made, tmp_path / "saved", gate=Jitter(), **settings):
                for _ in range(chance.randrange(400)):
                    await asyncio.sleep(0)
        async with life(made, tmp_path / "saved", gate=Jitter(), **settings) as node:
            while await states(made, count) != [TaskState.DONE] * count:
                await asyncio.sleep(0.01)
                command(made, save="request")
            assert weights(node) == pytest.approx([after_steps(count)] * settings["num_stages"])
        # How many were trained more than once on the way is a matter of chance.
        assert len(made.scheduler.trained) >= count
        manifest = json.loads((newest(tmp_path / "saved") / "manifest.json").read_text())["manifest"]
        assert manifest["positions"] == {"job": [[0, count - 1]]}
