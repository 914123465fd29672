"""Fixtures of the engine's unit tests."""

import tempfile
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _temporary_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines in this process are not closed by every test: what they leave goes with the test's own folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
