"""Checkpoints on disk: whole or not there, and what is known of them without reading."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from services.node_agent import checkpoint_store
from services.node_agent.checkpoint_manifest import Manifest
from services.node_agent.checkpoint_store import CheckpointStore

FILES = ("model-00001-of-00001.safetensors", "training-00001-of-00001.safetensors")


def make_store(path: Path, node_id: str = "node-0", *, keep: int = 2) -> CheckpointStore:
    model = path / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}", encoding="utf-8")
    store = CheckpointStore(path / "checkpoints", node_id, model, keep=keep)
    store.prepare()
    return store


def commit(store: CheckpointStore, step: int, **changes: Any) -> Manifest:
    partial = store.begin()
    for name in FILES:
        (partial / name).write_bytes(b"content")
    values: dict[str, Any] = {
        "node_id": "node-0",
        "incarnation": 1,
        "step": step,
        "created_unix_s": float(step),
        "trained_unix_s": None,
        "num_stages": 1,
        "reason": "request",
        "model": store.model,
    }
    return store.commit(partial, Manifest(**{**values, **changes}))


def steps(store: CheckpointStore) -> list[int]:
    return [manifest.step for manifest in store.manifests()]


def test_a_removal_that_does_not_come_to_its_end_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path, **_: Any) -> None:
        if (folder / FILES[0]).exists():
            (folder / FILES[0]).unlink()

    store = make_store(tmp_path, keep=1)
    commit(store, 1)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        commit(store, 2)
    assert [folder.name for folder in store.folders()] == ["0000000001-000000000002"]
    store.verify(store.folders()[0])
    assert [path.name for path in (tmp_path / "checkpoints" / "node-0").glob(".partial-*")]
    store = make_store(tmp_path, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints" / "node-0").iterdir()] == ["0000000001-000000000002"]


def test_an_attempt_that_failed_after_its_rename_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path)

    def fails(folder: Path) -> None:
        if folder == tmp_path / "checkpoints" / "node-0":
            raise OSError("Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_store, "flush", fails)
        with pytest.raises(OSError, match="Input/output error"):
            commit(store, 1)
    commit(store, 1, reason="again")
    assert [manifest.reason for manifest in store.manifests()] == ["again"]
    store.verify(store.folders()[0])


def test_what_is_held_is_known_without_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path)
    outcomes = {f"job/{index}": "00" for index in range(100)}
    for step in (1, 2):
        commit(store, step, outcomes=outcomes, positions={"job": [[0, 99]]})
    successor = make_store(tmp_path)

    def read(folder: Path) -> Manifest:
        raise AssertionError(f"{folder} was read")

    monkeypatch.setattr(checkpoint_store, "read_manifest", read)
    for known in (store, successor):
        assert steps(known) == [2, 1]
        newest = known.manifests()[0]
        assert newest.outcomes == {}
        assert newest.positions == {"job": [[0, 99]]}
        assert known.manifest_in(known.folder_of("node-0:1:2")) == newest


def test_what_is_held_changes_with_what_is_kept(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep=1)
    commit(store, 1)
    store.keep_for("job", "node-0:1:1")
    commit(store, 2)
    assert steps(store) == [2, 1]
    store.keep_for("job", "")
    assert steps(store) == [2]
    store.set_aside(store.folders()[0])
    assert steps(store) == []


def test_what_another_node_holds_is_read(tmp_path: Path) -> None:
    store, other = make_store(tmp_path), make_store(tmp_path, "node-1")
    commit(other, 3, node_id="node-1")
    assert steps(store) == []
    assert store.manifest_in(store.folder_of("node-1:1:3")).step == 3


def test_two_exports_of_one_checkpoint_at_once_both_come_to_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = make_store(tmp_path), make_store(tmp_path, "node-1")
    commit(store, 1)
    both = threading.Barrier(2, timeout=10.0)

    def export(folder: Path, model_path: Path, target: Path) -> None:
        both.wait()
        (target / "config.json").write_text(json.dumps({"from": folder.name}), encoding="utf-8")
        both.wait()

    monkeypatch.setattr(checkpoint_store, "export_model", export)
    with ThreadPoolExecutor(2) as threads:
        paths = list(threads.map(lambda each: each.export("node-0:1:1")[0], (store, other)))
    assert paths[0] == paths[1]
    assert json.loads((paths[0] / "config.json").read_text()) == {"from": "0000000001-000000000001"}
    assert [path.name for path in paths[0].parent.iterdir()] == ["node-0-1-1"]
    assert not list((tmp_path / "checkpoints").glob("*/.partial-*"))
