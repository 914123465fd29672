"""Scratch folders of killed nodes are removed, those of living ones are not."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from services.node_agent.scratch import ScratchFolder, remove_abandoned


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def _age(path: Path) -> None:
    os.utime(path, (1.0, 1.0))


def test_remove_takes_everything_with_it(tmp_path: Path) -> None:
    folder = ScratchFolder("weights")
    (folder.path / "file").write_bytes(b"x")
    assert folder.path.parent == tmp_path
    folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_living_owner_s_folder_stays_and_so_do_others_files(tmp_path: Path) -> None:
    mine = ScratchFolder("weights")
    other = tmp_path / "somebody-else"
    other.mkdir()
    (tmp_path / "lemix-scratch-link").symlink_to(other, target_is_directory=True)
    for path in (mine.path, other):
        _age(path)
    remove_abandoned()
    assert mine.path.is_dir()
    assert other.is_dir()
    mine.remove()


def test_a_killed_owner_s_folder_goes_when_the_next_one_is_made(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from services.node_agent.scratch import ScratchFolder\n"
        "folder = ScratchFolder('weights'); (folder.path / 'file').write_bytes(b'x')\n"
        "print(folder.path, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, timeout=30, check=False
    )
    left = Path(done.stdout.decode().strip())
    assert left.is_dir()
    ScratchFolder("engine").remove()
    assert left.is_dir(), "it might be one that is just being made"
    _age(left)
    ScratchFolder("engine").remove()
    assert not left.exists()
