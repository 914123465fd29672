"""Going back to a checkpoint, and taking over what another node published."""

import contextlib
from pathlib import Path
from typing import Any

import pytest

from lemix.internal.v1 import scheduler_service_pb2 as scheduler_pb2
from lemix.v1 import errors_pb2
from services.ledger import open_ledger
from tests.integration.node_agent.checkpoint_life import (
    NO_TIME,
    Away,
    Disk,
    Jitter,
    after_steps,
    command,
    life,
    train,
    train_and_save,
    weights,
)
from tests.integration.node_agent.harness import (
    cluster,
    inference_item,
    training_item,
)


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


async def publish(made: Any, checkpoint_id: str, source: Any, node: Any, *, step: int = 1) -> None:
    """A checkpoint of `source` with two steps becomes the weights of node-1, as this step of it."""
    apply = scheduler_pb2.ApplyWeights(
        sync_id=f"checkpoint/{checkpoint_id}",
        mode=scheduler_pb2.SYNC_MODE_REPLACE,
        source_addresses=[source.agent.address],
    )
    made.scheduler.command("node-1", apply_weights=apply)
    (finished,) = await made.scheduler.sync_finished(1)
    assert not finished.HasField("error")
    assert finished.weight_step == step
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


async def test_no_gradient_outlives_a_publication(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made, life(made, tmp_path / "a", checkpoint_every_steps=2) as source:
        await train_and_save(made, 2)
        checkpoint_id = (await made.scheduler.checkpoint(1)).checkpoint.checkpoint_id
        node = await made.start_node("node-1", num_stages=1)
        await made.assign(training_item("job", 2, [[1, 2, 3]], gradient_accumulation_steps=2), "node-1")
        await made.scheduler.until(lambda: node.agent._loop.snapshot().accumulated_microbatches, "half a group")
        await publish(made, checkpoint_id, source, node, step=2)
        assert await made.scheduler.outcome("job/2")


async def test_published_weights_are_in_place_although_they_cannot_be_saved_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.node_agent.checkpoint_schedule._RETRY_S", 0.01)
    disk = Disk()
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
    monkeypatch.setattr("services.node_agent.checkpoint_schedule._RETRY_S", 0.01)
    disk = Disk()
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


async def test_what_the_checkpoint_of_another_node_contains_is_not_trained_again(tmp_path: Path) -> None:
    """Its node died before the ledger knew."""
    async with cluster(tmp_path) as made:
        ledger = Away(await open_ledger(made.ledger_url))
        async with life(made, tmp_path / "shared", checkpoint_every_steps=2, ledger=ledger):
            await train_and_save(made, 3)
        checkpoint_id = made.scheduler.checkpoints[-1].checkpoint.checkpoint_id
        settings = {**NO_TIME, "checkpoint_directory": str(tmp_path / "shared"), "checkpoint_every_steps": 1}
        node = await made.start_node("node-1", **settings)
        made.scheduler.command("node-1", checkpoint=scheduler_pb2.CheckpointCommand(restore=checkpoint_id))
        await made.scheduler.checkpoint(2)
        for item in await made.ledger.take_back("node-0", token=made.token):
            assert await made.ledger.assign(item, "node-1", entry_id=None, token=made.token)
        for sequence in range(3):
            assert (await made.scheduler.outcome(f"job/{sequence}")).node_id == "node-1"
        assert made.scheduler.trained == ["job/0", "job/1", "job/2", "job/2"]
        assert weights(node) == pytest.approx([after_steps(3)] * 2)


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
