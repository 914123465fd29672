"""What a node does with its folder of checkpoints while something else goes on."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lemix.internal.v1 import scheduler_service_pb2 as scheduler_pb2
from services.node_agent import checkpoint_store
from services.node_agent.checkpoint_commands import CheckpointCommands
from services.node_agent.checkpoint_files import weights_files
from services.node_agent.checkpoint_manifest import Manifest
from services.node_agent.checkpoint_report import CheckpointReports
from services.node_agent.checkpoint_schedule import CheckpointLimits
from services.node_agent.checkpoint_store import CheckpointStore
from services.node_agent.checkpoints import Checkpointer
from services.node_agent.weight_ops import WeightOp
from services.runtime.clock import SystemClock
from tests.integration.node_agent.harness import write_model

TIMEOUT_S = 10.0


class Held:
    """A method that waits in its thread, and records when it begins and ends."""

    def __init__(self, method: Callable[..., Any], log: list[str]) -> None:
        self._method, self._log = method, log
        self._name = method.__name__
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self, *arguments: Any) -> Any:
        self._log.append(f"{self._name} begins")
        self.begun.set()
        assert self.go_on.wait(TIMEOUT_S)
        try:
            return self._method(*arguments)
        finally:
            self._log.append(f"{self._name} ends")

    async def until_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.wait, TIMEOUT_S)


def logged(method: Callable[..., Any], log: list[str]) -> Callable[..., Any]:
    """The method, recorded."""

    def call(*arguments: Any) -> Any:
        log.append(method.__name__)
        return method(*arguments)

    return call


@dataclass(frozen=True)
class Made:
    """A node's checkpoints and what the scheduler was told of them."""

    checkpoints: Checkpointer
    commands: CheckpointCommands
    store: CheckpointStore
    sent: list[scheduler_pb2.CheckpointReport]


def make(path: Path, *, keep: int = 3) -> Made:
    """Checkpoints at step 5 whose stages write nothing."""

    async def run_weight_op(subject: str, weight_op: WeightOp) -> None:
        weight_op.version = 5

    store = CheckpointStore(path / "checkpoints", "node-0", write_model(path / "model"), keep=keep)
    store.prepare()
    loop = SimpleNamespace(
        run_weight_op=run_weight_op,
        ages=SimpleNamespace(newest_step=5, at=lambda step: None),
        node_id="node-0",
        num_stages=1,
        optimizers={},
        adopt_optimizers=lambda specs: None,
        adopt_adapters=lambda specs, weights_changed, trained_unix_s: None,
        adapters=SimpleNamespace(held={}, trained_unix_s={}),
    )
    sent: list[scheduler_pb2.CheckpointReport] = []
    reports = CheckpointReports(store, loop, 1, sent.append)  # type: ignore[arg-type]
    checkpoints = Checkpointer(
        store=store,
        loop=loop,  # type: ignore[arg-type]
        incarnation=1,
        clock=SystemClock(),
        limits=CheckpointLimits(every_steps=0, every_s=0.0, max_unsaved=8, give_up_s=60.0),
        finish=lambda outcome: None,
        reports=reports,
    )
    return Made(checkpoints, CheckpointCommands(checkpoints, store, reports), store, sent)


def commit(store: CheckpointStore, step: int) -> Path:
    partial = store.begin()
    (partial / "model-00001-of-00001.safetensors").write_bytes(b"content")
    manifest = Manifest(
        node_id="node-0",
        incarnation=1,
        step=step,
        created_unix_s=0.0,
        trained_unix_s=None,
        num_stages=1,
        reason="request",
        model=store.model,
    )
    store.commit(partial, manifest)
    return store.folder_of(f"node-0:1:{step}")


@pytest.mark.parametrize("cancellations", [1, 2])
async def test_a_save_that_is_given_up_waits_for_what_its_thread_writes(tmp_path: Path, cancellations: int) -> None:
    made = make(tmp_path)
    log: list[str] = []
    held = Held(made.store.commit, log)
    made.store.commit, made.store.discard = held, logged(made.store.discard, log)  # type: ignore[method-assign]
    saving = asyncio.create_task(made.checkpoints.save("request"))
    await held.until_begun()
    for _ in range(cancellations):
        saving.cancel()
        for _ in range(3):
            await asyncio.sleep(0)
    assert not saving.done()
    held.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await saving
    assert log == ["commit begins", "commit ends", "discard"]
    made.store.verify(made.store.folder_of("node-0:1:5"))


async def test_nothing_is_removed_beside_a_restore(tmp_path: Path) -> None:
    made = make(tmp_path)
    commit(made.store, 1)
    log: list[str] = []
    held, beside = Held(made.store.verify, log), Held(made.store.keep_for, log)
    made.store.verify = held  # type: ignore[method-assign]
    made.store.keep_for = beside  # type: ignore[method-assign]
    beside.go_on.set()
    made.commands.start(scheduler_pb2.CheckpointCommand(request_id="restore", restore="node-0:1:1"))
    await held.until_begun()
    keep = scheduler_pb2.KeepCheckpoint(job_id="job", checkpoint_id="node-0:1:1")
    made.commands.start(scheduler_pb2.CheckpointCommand(request_id="beside", keep=keep))
    for _ in range(20):
        await asyncio.sleep(0)
    held.go_on.set()
    await beside.until_begun()
    assert log[:3] == ["verify begins", "verify ends", "keep_for begins"]
    await made.commands.close()
    assert not any(report.HasField("error") for report in made.sent)


async def test_checkpoints_are_saved_beside_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path, keep=1)
    exported = commit(made.store, 1)

    def write(folder: Path, model_path: Path, target: Path) -> None:
        (target / "names").write_text(" ".join(path.name for path in weights_files(folder)), encoding="utf-8")

    held = Held(write, [])
    monkeypatch.setattr(checkpoint_store, "export_model", held)
    made.commands.start(scheduler_pb2.CheckpointCommand(request_id="export", export="node-0:1:1"))
    await held.until_begun()
    await made.checkpoints.save("request", "save")
    assert [report.request_id for report in made.sent] == ["save"]
    assert exported.is_dir(), "it is being read"
    held.go_on.set()
    async with asyncio.timeout(TIMEOUT_S):
        while len(made.sent) < 2:  # noqa: ASYNC110  a thread brings it
            await asyncio.sleep(0.01)
    assert (Path(made.sent[1].path) / "names").read_text() == "model-00001-of-00001.safetensors"
    assert not exported.exists(), "too old, and nobody reads it any more"
    assert [manifest.step for manifest in made.store.manifests()] == [5]


async def test_the_newest_corrupted_checkpoint_is_the_evidence_that_stays(tmp_path: Path) -> None:
    made = make(tmp_path)
    folders = [commit(made.store, step) for step in (1, 2, 3)]
    for folder in folders[1:]:
        (folder / "model-00001-of-00001.safetensors").write_bytes(b"changed")
    used = await made.checkpoints.restore_newest()
    assert used is not None
    assert used.step == 1
    aside = [path.name for path in (tmp_path / "checkpoints" / "node-0").glob(".corrupted-*")]
    assert aside == [f".corrupted-{folders[2].name}"]
    assert [manifest.step for manifest in made.store.manifests()] == [1]


async def test_a_node_starts_although_a_corrupted_checkpoint_cannot_be_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(source: Path, target: Path) -> None:
        raise OSError(30, "Read-only file system")

    made = make(tmp_path)
    folders = [commit(made.store, step) for step in (1, 2)]
    (folders[1] / "model-00001-of-00001.safetensors").write_bytes(b"changed")
    monkeypatch.setattr("os.rename", read_only)
    used = await made.checkpoints.restore_newest()
    assert used is not None
    assert used.step == 1
    assert "is corrupted, it started from node-0:1:1" in made.checkpoints.note
