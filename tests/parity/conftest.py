"""Models for the parity tests, written once."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.parity.reference import exact_norms
from tests.parity.tiny import write_tiny_gpt2, write_tiny_llama

MODELS = ("llama", "llama-tied", "gpt2", "gpt2-untied")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of tiny four-layer models by name."""
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": write_tiny_llama(root / "llama"),
        "llama-tied": write_tiny_llama(root / "llama-tied", tied=True),
        "gpt2": write_tiny_gpt2(root / "gpt2"),
        "gpt2-untied": write_tiny_gpt2(root / "gpt2-untied", tied=False),
    }


@pytest.fixture(autouse=True)
def _temporary_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines in this process are not closed by every test: what they leave goes with the test's own folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture(autouse=True)
def _one_thread_exact() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with exact_norms():
        yield
    torch.set_num_threads(threads)
