"""Checkpoints of a running node: what they cover, what is trained again, and what happens when they go wrong.

The emulated weights shrink by a tenth with every step, so that a weight tells how many steps it contains.
"""

import asyncio
import contextlib
import errno
import json
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from lemix.internal.v1 import scheduler_service_pb2 as scheduler_pb2
from lemix.internal.v1 import work_pb2
from lemix.v1 import errors_pb2
from services.ledger import LedgerUnavailable, TaskState, open_ledger
from services.node_agent.checkpoint_files import weights_files
from services.node_agent.engine.base import StageResult
from services.node_agent.engine.ops import StageOp
from services.node_agent.engine.weight_ops import SaveCheckpoint
from services.runtime.app import StartupError
from tests.integration.node_agent.harness import (
    Cluster,
    Gate,
    Node,
    cluster,
    inference_item,
    training_item,
    write_model,
)

NO_TIME = {"checkpoint_every_s": 0.0, "checkpoint_every_steps": 0}


def after_steps(count: int) -> float:
    """An emulated weight after so many steps."""
    return 4.0 * 0.9**count


def weights(node: Node) -> list[float]:
    return [worker.stage.weight for worker in node.engine.workers]


async def train(made: Cluster, sequences: Sequence[int], **work: Any) -> None:
    """Assign micro-batches of one job, in order."""
    for sequence in sequences:
        item = training_item("job", sequence, [[1, 2, 3]])
        item.training.checkpoint.CopyFrom(work_pb2.TrainingWork(**work).checkpoint)
        await made.assign(item)


async def trained(made: Cluster, count: int) -> None:
    await made.scheduler.until(lambda: len(made.scheduler.trained) >= count, f"{count} trained micro-batches")


async def train_and_save(made: Cluster, count: int) -> None:
    """That many micro-batches from the first on, with a checkpoint after every second one."""
    for sequence in range(count):
        await train(made, [sequence])
        await trained(made, sequence + 1)
        if sequence % 2:
            await made.scheduler.checkpoint((sequence + 1) // 2)


def command(made: Cluster, **action: str) -> None:
    request = scheduler_pb2.CheckpointCommand(request_id="request", **action)
    made.scheduler.command("node-0", checkpoint=request)


async def states(made: Cluster, count: int) -> list[str]:
    """Where the ledger says the first micro-batches are."""
    records = [await made.ledger.record(f"job/{sequence}") for sequence in range(count)]
    return [str(record.state) for record in records if record is not None]


@contextlib.asynccontextmanager
async def life(made: Cluster, folder: Path, **settings: Any) -> AsyncIterator[Node]:
    """A node that ends with the block as if it were killed: nothing is finished, nothing is saved."""
    async with contextlib.AsyncExitStack() as stack:
        yield await made.start_node(stack=stack, checkpoint_directory=str(folder), **{**NO_TIME, **settings})


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
    class Away:
        def __init__(self, ledger: Any) -> None:
            self._ledger = ledger

        def __getattr__(self, name: str) -> Any:
            return getattr(self._ledger, name)

        async def finish(self, *_: Any) -> bool:
            raise LedgerUnavailable("redis://nowhere is away")

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


async def _two_checkpoints(made: Cluster, folder: Path) -> None:
    async with life(made, folder, checkpoint_every_steps=2):
        await train_and_save(made, 4)
        await made.scheduler.outcome("job/3")


def newest(folder: Path) -> Path:
    return max((folder / "node-0").glob("[0-9]*"))


async def test_a_corrupted_checkpoint_is_not_used_and_that_is_said(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        await _two_checkpoints(made, tmp_path / "saved")
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
        await _two_checkpoints(made, tmp_path / "saved")
        (newest(tmp_path / "saved") / "manifest.json").write_text('{"format": 1}')
        async with life(made, tmp_path / "saved") as node:
            assert "its list of micro-batches is corrupted as well" in made.scheduler.hellos[-1].restore_note
            assert weights(node) == pytest.approx([after_steps(2)] * 2)


async def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        await _two_checkpoints(made, tmp_path / "saved")
        write_model(made.model, num_hidden_layers=6)
        with pytest.raises(StartupError, match="is of another model: num_hidden_layers is 4, here 6; name another"):
            async with life(made, tmp_path / "saved"):
                pass


class _Disk:
    """Lets checkpoints fail on a stage as a full disk does."""

    def __init__(self) -> None:
        self.full = False

    def __call__(self, stage: int, op: StageOp, result: StageResult) -> StageResult:
        if self.full and isinstance(op, SaveCheckpoint):
            return replace(result, error="OSError: [Errno 28] No space left on device")
        return result


async def test_a_full_disk_is_reported_and_the_job_goes_on(tmp_path: Path) -> None:
    disk = _Disk()
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
    disk = _Disk()
    disk.full = True
    settings = {"checkpoint_every_steps": 2, "checkpoint_give_up_s": 0.0, "tamper": disk}
    async with cluster(tmp_path) as made, life(made, tmp_path / "saved", **settings):
        await train(made, [0, 1])
        assert (await made.scheduler.checkpoint(1)).HasField("error")
        assert not (await made.scheduler.outcome("job/1")).training.HasField("error")


async def test_no_more_is_trained_than_a_crash_may_cost(tmp_path: Path) -> None:
    disk = _Disk()
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
    disk = _Disk()
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


async def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made, life(made, tmp_path / "saved", checkpoint_every_steps=1, checkpoint_keep=2):
        for sequence in range(4):
            await train(made, [sequence])
            report = await made.scheduler.checkpoint(sequence + 1)
        assert [held.checkpoint_id.rsplit(":", 1)[1] for held in report.held] == ["4", "3"]
        assert len(list((tmp_path / "saved" / "node-0").iterdir())) == 2


async def test_a_rollback_raises_the_version_and_outlives_a_crash(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        async with life(made, tmp_path / "saved", checkpoint_every_steps=2) as node:
            await train_and_save(made, 5)
            good = (await made.scheduler.checkpoint(1)).checkpoint
            command(made, restore=good.checkpoint_id)
            await made.scheduler.until(lambda: made.scheduler.checkpoints[-1].request_id == "request", "the answer")
            report = made.scheduler.checkpoints[-1]
            assert report.version.step == 6
            assert report.checkpoint.reason == "rollback"
            assert weights(node) == pytest.approx([after_steps(2)] * 2)
            assert await made.scheduler.outcome("job/4")  # undone on purpose: it is not trained again
        async with life(made, tmp_path / "saved") as node:
            assert weights(node) == pytest.approx([after_steps(2)] * 2)
            assert made.scheduler.trained == [f"job/{sequence}" for sequence in range(5)]


async def test_no_gradient_outlives_a_rollback(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made, life(made, tmp_path / "saved", checkpoint_every_steps=2) as node:
        await train_and_save(made, 2)
        good = (await made.scheduler.checkpoint(1)).checkpoint
        item = training_item("job", 2, [[1, 2, 3]], gradient_accumulation_steps=2)
        await made.assign(item)
        await made.scheduler.until(lambda: node.agent._loop.snapshot().accumulated_microbatches, "half a group")
        command(made, restore=good.checkpoint_id)
        await made.scheduler.until(lambda: made.scheduler.checkpoints[-1].request_id == "request", "the answer")
        assert made.scheduler.trained == [f"job/{sequence}" for sequence in range(3)]
        assert made.scheduler.checkpoints[-1].version.step == 4
        assert weights(node) == pytest.approx([after_steps(2)] * 2)


async def test_a_new_session_tells_again_what_is_in_no_checkpoint(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made, life(made, tmp_path / "saved"):
        await train(made, [0, 1])
        await trained(made, 2)
        await made.scheduler.stop()
        await made.scheduler.start()
        await trained(made, 4)
        assert made.scheduler.trained == ["job/0", "job/1"] * 2


@pytest.mark.parametrize(
    ("action", "code"),
    [
        ({"restore": "node-0:1:1"}, errors_pb2.ERROR_CODE_NOT_FOUND),
        ({"restore": "../elsewhere:1:1"}, errors_pb2.ERROR_CODE_NOT_FOUND),
        ({"restore": "..:1:1"}, errors_pb2.ERROR_CODE_NOT_FOUND),
        ({"restore": ".:1:1"}, errors_pb2.ERROR_CODE_NOT_FOUND),
        ({"restore": "a/b:1:1"}, errors_pb2.ERROR_CODE_NOT_FOUND),
        ({"restore": f"node-0:{'9' * 300}:1"}, errors_pb2.ERROR_CODE_NOT_FOUND),
        ({"export": "..:1:1"}, errors_pb2.ERROR_CODE_NOT_FOUND),
        ({"export": "nonsense"}, errors_pb2.ERROR_CODE_NOT_FOUND),
    ],
)
async def test_unknown_checkpoints_are_refused(tmp_path: Path, action: dict[str, str], code: int) -> None:
    for folder in (tmp_path, tmp_path / "saved", tmp_path / "elsewhere", tmp_path / "saved/a/b"):
        (folder / "0000000001-000000000001").mkdir(parents=True)
        (folder / "0000000001-000000000001/manifest.json").write_text("{}", encoding="utf-8")
    async with cluster(tmp_path) as made, life(made, tmp_path / "saved"):
        command(made, **action)
        assert (await made.scheduler.checkpoint(1)).error.code == code


async def test_a_node_without_a_folder_for_them_keeps_no_checkpoints(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        await made.start_node()
        assert not made.scheduler.hellos[0].keeps_checkpoints
        command(made, save="request")
        assert (await made.scheduler.checkpoint(1)).error.code == errors_pb2.ERROR_CODE_CONFLICT
        await train(made, [0])
        assert await made.scheduler.outcome("job/0")


async def evaluated(made: Cluster, examples: Sequence[list[int]]) -> scheduler_pb2.EvaluationReport:
    items = [work_pb2.TrainingExample(token_ids=example) for example in examples]
    command = scheduler_pb2.EvaluateCommand(request_id="e", examples=items)
    made.scheduler.command("node-0", evaluate=command)
    await made.scheduler.until(lambda: made.scheduler.evaluations, "a held-out loss")
    return made.scheduler.evaluations[-1]


async def test_a_heldout_loss_is_measured_and_leaves_nothing(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made, life(made, tmp_path / "saved") as node:
        await train(made, [0])
        await trained(made, 1)
        report = await evaluated(made, [[1, 2, 3], [4, 5]])
        assert not report.HasField("error")
        assert report.label_tokens == 3
        assert report.loss == pytest.approx(after_steps(1))
        assert node.held_by_stages() == []
        await train(made, [1])
        await trained(made, 2)


@pytest.mark.parametrize("examples", [[], [[1]], [[1, 1000]]])
async def test_bad_heldout_examples_are_refused(tmp_path: Path, examples: list[list[int]]) -> None:
    async with cluster(tmp_path) as made, life(made, tmp_path / "saved"):
        assert (await evaluated(made, examples)).error.code == errors_pb2.ERROR_CODE_INVALID_REQUEST


async def test_a_checkpoint_that_is_kept_outlives_newer_ones(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made, life(made, tmp_path / "saved", checkpoint_every_steps=1, checkpoint_keep=1):
        await train(made, [0])
        best = (await made.scheduler.checkpoint(1)).checkpoint.checkpoint_id

        def keep(checkpoint_id: str) -> None:
            wanted = scheduler_pb2.KeepCheckpoint(job_id="job", checkpoint_id=checkpoint_id)
            made.scheduler.command("node-0", checkpoint=scheduler_pb2.CheckpointCommand(keep=wanted))

        keep(best)
        for sequence in (1, 2):
            await train(made, [sequence])
            report = await made.scheduler.checkpoint(sequence + 1)
        assert [held.checkpoint_id for held in report.held][-1] == best
        assert len(report.held) == 2
        keep("")
        await train(made, [3])
        report = await made.scheduler.checkpoint(4)
        assert len(report.held) == 1


async def publish(made: Any, checkpoint_id: str, source: Any, node: Any) -> None:
    """A checkpoint of `source` with two steps becomes the weights of node-1."""
    apply = scheduler_pb2.ApplyWeights(
        sync_id=f"checkpoint/{checkpoint_id}",
        mode=scheduler_pb2.SYNC_MODE_REPLACE,
        source_addresses=[source.agent.address],
    )
    made.scheduler.command("node-1", apply_weights=apply)
    (finished,) = await made.scheduler.sync_finished(1)
    assert not finished.HasField("error")
    assert finished.weight_step == 1
    assert weights(node) == pytest.approx([after_steps(2)])


async def test_a_published_checkpoint_is_taken_over_and_outlives_a_crash(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made, life(made, tmp_path / "a", checkpoint_every_steps=2) as source:
        await train_and_save(made, 3)
        checkpoint_id = (await made.scheduler.checkpoint(1)).checkpoint.checkpoint_id
        settings = {**NO_TIME, "checkpoint_directory": str(tmp_path / "b")}
        async with contextlib.AsyncExitStack() as stack:
            node = await made.start_node("node-1", num_stages=1, stack=stack, **settings)
            await publish(made, checkpoint_id, source, node)
        async with contextlib.AsyncExitStack() as stack:
            node = await made.start_node("node-1", num_stages=1, stack=stack, **settings)
            assert made.scheduler.hellos[-1].checkpoints[0].reason == "publish"
            assert weights(node) == pytest.approx([after_steps(2)])


async def test_published_weights_are_in_place_although_they_cannot_be_saved_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.node_agent.checkpoints._RETRY_S", 0.01)
    disk = _Disk()
    disk.full = True
    async with cluster(tmp_path) as made, life(made, tmp_path / "a", checkpoint_every_steps=2) as source:
        await train_and_save(made, 2)
        checkpoint_id = (await made.scheduler.checkpoint(1)).checkpoint.checkpoint_id
        settings = {**NO_TIME, "checkpoint_directory": str(tmp_path / "b"), "tamper": disk}
        node = await made.start_node("node-1", num_stages=1, **settings)
        await publish(made, checkpoint_id, source, node)
        assert "No space left on device" in (await made.scheduler.checkpoint(2)).error.message
        disk.full = False
        await made.scheduler.until(lambda: made.scheduler.checkpoints[-1].checkpoint.reason == "publish", "it is saved")


async def test_a_rollback_that_cannot_be_saved_yet_is_saved_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.node_agent.checkpoints._RETRY_S", 0.01)
    disk = _Disk()
    async with cluster(tmp_path) as made, life(made, tmp_path / "saved", checkpoint_every_steps=2, tamper=disk):
        await train_and_save(made, 2)
        checkpoint_id = (await made.scheduler.checkpoint(1)).checkpoint.checkpoint_id
        disk.full = True
        command(made, restore=checkpoint_id)
        assert "No space left on device" in (await made.scheduler.checkpoint(2)).error.message
        disk.full = False
        await made.scheduler.until(
            lambda: made.scheduler.checkpoints[-1].checkpoint.reason == "rollback", "it is saved"
        )


class Jitter(Gate):
    """Ops take a few turns of the loop, each stage and op another number."""

    def __init__(self) -> None:
        super().__init__()
        self._random = random.Random(7)

    async def sleep(self, seconds: float) -> None:
        for _ in range(self._random.randrange(4)):
            await asyncio.sleep(0)


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


async def test_another_node_goes_on_from_the_checkpoint_of_one_that_is_gone(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        async with life(made, tmp_path / "shared", checkpoint_every_steps=2):
            await train_and_save(made, 2)
            checkpoint_id = (await made.scheduler.checkpoint(1)).checkpoint.checkpoint_id
        settings = {**NO_TIME, "checkpoint_directory": str(tmp_path / "shared")}
        node = await made.start_node("node-1", **settings)
        request = scheduler_pb2.CheckpointCommand(request_id="request", restore=checkpoint_id)
        made.scheduler.command("node-1", checkpoint=request)
        report = await made.scheduler.checkpoint(2)
        assert report.checkpoint.checkpoint_id.startswith("node-1:")
        assert report.checkpoint.trained_microbatches["job"] == 2
        assert weights(node) == pytest.approx([after_steps(2)] * 2)


def _step(checkpoint_id: str) -> int:
    return int(checkpoint_id.rsplit(":", 1)[1]) if checkpoint_id else 0


@pytest.mark.parametrize("handling", ["drain", "stash"])
async def test_no_request_sees_a_half_restored_model(tmp_path: Path, handling: str) -> None:
    """The emulated loss is the mean of the stages' weights: with two versions mixed it would be none of either."""
    settings = {"checkpoint_every_steps": 4, "num_stages": 3, "weight_handling": handling, "max_batch": 2}
    async with cluster(tmp_path) as made, life(made, tmp_path / "saved", gate=Jitter(), **settings) as node:
        for sequence in range(4):
            await train(made, [sequence])
        checkpoint_id = (await made.scheduler.checkpoint(1)).checkpoint.checkpoint_id
        saved_step = _step(checkpoint_id)
        await train(made, range(4, 8))
        for index in range(40):
            reference = {"reference_token_ids": [1, 2]}
            await made.assign(inference_item(f"r{index}", [1, 2], 3, **reference))
            if index % 10 == 5:
                command(made, restore=checkpoint_id)
        whole = {after_steps(count) for count in range(9)}
        for index in range(40):
            outcome = (await made.scheduler.outcome(f"r{index}")).inference
            assert not outcome.HasField("error")
            assert any(outcome.report.reference_loss == pytest.approx(value) for value in whole)
            steps = [version.step for version in outcome.report.weight_versions]
            assert steps == sorted(steps)
        # Eight steps were made: later versions are those of restored weights. An interval that is over saves them too.
        await made.scheduler.until(
            lambda: any(_step(report.checkpoint.checkpoint_id) > 8 for report in made.scheduler.checkpoints),
            "a checkpoint of the restored weights",
        )
        assert saved_step >= 4
        assert len({round(weight, 6) for weight in weights(node)}) == 1
