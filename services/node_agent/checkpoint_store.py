"""Checkpoints of one node on disk: `<directory>/<node id>/<incarnation>-<step>/`, appearing whole or not at all.

Each holds the stages' files and `manifest.json`, which names the model, the position in the data and a SHA-256 of
every file and of itself. Everything here blocks; call it in a thread.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lemix.errors import ErrorCode, LemixError
from services.node_agent.checkpoint_export import export_adapter, export_model
from services.node_agent.checkpoint_files import flush, state_files, weights_files
from services.node_agent.checkpoint_manifest import (
    MANIFEST_FILE,
    CorruptedCheckpoint,
    Manifest,
    model_differences,
    model_identity,
    read_manifest,
    write_manifest,
)
from services.node_agent.engine.training_ops import AdapterSpec

_NAME = re.compile(r"(\d{10})-(\d{12})")
#: Whoever asks chooses it, and it becomes a path: no separators, no "..", nothing hidden.
_ID = re.compile(r"([A-Za-z0-9_-][A-Za-z0-9._-]{0,63}):([0-9]{1,10}):([0-9]{1,12})")
_PARTIAL_PREFIX = ".partial-"
_CORRUPTED_PREFIX = ".corrupted-"
_KEPT_PREFIX = "kept-for-"
_HASH_BLOCK_BYTES = 1 << 20


class CheckpointStore:
    """One node's folder. keep: complete checkpoints that stay, the newest, besides those kept for jobs."""

    def __init__(self, directory: Path, node_id: str, model_path: Path, *, keep: int) -> None:
        self._directory = directory
        self._folder = directory / node_id
        self._node_id = node_id
        self._model_path = model_path
        self._keep = keep
        #: By folder, the newest first; replaced as a whole, so that any thread may read it.
        self._manifests: dict[Path, Manifest] = {}
        #: Checkpoints that are being exported stay. Guards them, and removals.
        self._pins: Counter[Path] = Counter()
        self._removing = threading.Lock()
        self.model = model_identity(model_path)

    def prepare(self) -> None:
        """Make the folder and remove what a killed process left half written. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for partial in self._folder.glob(f"{_PARTIAL_PREFIX}*"):
            shutil.rmtree(partial, ignore_errors=True)
        self._refresh()

    # ------------------------------------------------------------- reading

    def newest_incarnation(self) -> int:
        """Highest incarnation of which there is a checkpoint; 0: none."""
        return max((incarnation for (incarnation, _), _ in self._found()), default=0)

    def folders(self) -> list[Path]:
        """Complete checkpoints, the newest first."""
        return [folder for _, folder in sorted(self._found(), reverse=True)]

    def _found(self) -> list[tuple[tuple[int, int], Path]]:
        if not self._folder.is_dir():
            return []
        matches = [(_NAME.fullmatch(folder.name), folder) for folder in self._folder.iterdir()]
        return [((int(match[1]), int(match[2])), folder) for match, folder in matches if match]

    def manifests(self) -> list[Manifest]:
        """Of the readable checkpoints, the newest first, without their outcomes. Never blocks: nothing is read."""
        return list(self._manifests.values())

    def manifest_in(self, folder: Path) -> Manifest:
        """The same of one checkpoint; another node's is read. Raises CorruptedCheckpoint."""
        return self._manifests.get(folder) or read_manifest(folder)

    def _refresh(self) -> None:
        """Look which checkpoints there are now."""
        found = {}
        for folder in self.folders():
            # Outcomes are many, and only who restores needs them.
            with contextlib.suppress(CorruptedCheckpoint):
                found[folder] = self._manifests.get(folder) or replace(read_manifest(folder), outcomes={})
        self._manifests = found

    def folder_of(self, checkpoint_id: str) -> Path:
        """Where a checkpoint lies, this node's or, in a shared directory, another's. Raises LemixError NOT_FOUND."""
        match = _ID.fullmatch(checkpoint_id)
        if match is not None:
            folder = self._directory / match[1] / _folder_name(int(match[2]), int(match[3]))
            if (folder / MANIFEST_FILE).is_file():
                return folder
        raise LemixError(ErrorCode.NOT_FOUND, f"there is no checkpoint {checkpoint_id[:200]!r}", param="checkpoint_id")

    def verify(self, folder: Path) -> Manifest:
        """Read every byte of a checkpoint. Raises CorruptedCheckpoint, or LemixError CONFLICT for another model."""
        manifest = read_manifest(folder)
        self.check_model(manifest)
        for name, expected in manifest.files.items():
            try:
                found = _digest(folder / name)
            except OSError as error:
                raise CorruptedCheckpoint(f"checkpoint {manifest.checkpoint_id}: {name}: {error.strerror}") from error
            if found != expected:
                raise CorruptedCheckpoint(f"checkpoint {manifest.checkpoint_id}: {name} is not what was written")
        return manifest

    def check_model(self, manifest: Manifest) -> None:
        """Raises LemixError CONFLICT naming what differs when a checkpoint is of another model."""
        differences = model_differences(manifest.model, self.model)
        if differences:
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            message = f"checkpoint {manifest.checkpoint_id} is of another model: {'; '.join(differences[:3])}{more}"
            raise LemixError(ErrorCode.CONFLICT, message, param="checkpoint_id")

    # ------------------------------------------------------------- writing

    def begin(self) -> Path:
        """A new folder for the stages' files. Raises OSError."""
        return Path(tempfile.mkdtemp(prefix=_PARTIAL_PREFIX, dir=self._folder))

    def commit(self, partial: Path, manifest: Manifest) -> Manifest:
        """Make what the stages wrote a checkpoint, durably, and remove the oldest beyond `keep`. Raises OSError."""
        files = {}
        for path in [*weights_files(partial), *state_files(partial)]:
            flush(path)
            files[path.name] = _digest(path)
        manifest = replace(manifest, files=files)
        write_manifest(partial, manifest)
        folder = self._folder / _folder_name(manifest.incarnation, manifest.step)
        if folder.exists():  # the last attempt failed after its rename
            self._remove(folder)
            self._refresh()
        os.rename(partial, folder)
        flush(self._folder)
        self._prune()
        return manifest

    def keep_for(self, job_id: str, checkpoint_id: str) -> None:
        """Keep this checkpoint of this node for a job whatever its age, and no other one for it; empty: none.

        Raises LemixError NOT_FOUND, OSError.
        """
        chosen = self.folder_of(checkpoint_id) if checkpoint_id else None
        if chosen is not None:
            (chosen / f"{_KEPT_PREFIX}{job_id}").touch()
        for folder in self.folders():
            if folder != chosen:
                (folder / f"{_KEPT_PREFIX}{job_id}").unlink(missing_ok=True)
        self._prune()

    def _prune(self) -> None:
        with self._removing:
            for old in self.folders()[self._keep :]:
                if not (self._pins[old] or any(old.glob(f"{_KEPT_PREFIX}*"))):
                    with contextlib.suppress(OSError):  # tried again after the next one
                        self._remove(old)
            self._refresh()

    @contextlib.contextmanager
    def _pinned(self, checkpoint_id: str) -> Iterator[Path]:
        """Where a checkpoint lies; it is not removed for its age meanwhile. Raises LemixError NOT_FOUND."""
        with self._removing:
            folder = self.folder_of(checkpoint_id)
            self._pins[folder] += 1
        try:
            yield folder
        finally:
            with self._removing:
                self._pins[folder] -= 1
                self._pins += Counter()  # without those at 0
            self._prune()

    def _remove(self, folder: Path) -> None:
        """What is killed or fails half way leaves no checkpoint with half its files. Raises OSError."""
        leaving = folder.with_name(_PARTIAL_PREFIX + folder.name)
        shutil.rmtree(leaving, ignore_errors=True)
        os.rename(folder, leaving)
        shutil.rmtree(leaving, ignore_errors=True)

    def set_aside(self, folder: Path) -> None:
        """Keep a corrupted checkpoint for whoever wants to know why, but no longer as one; only the last such.

        Raises OSError.
        """
        for earlier in self._folder.glob(f"{_CORRUPTED_PREFIX}*"):
            shutil.rmtree(earlier, ignore_errors=True)
        os.rename(folder, folder.with_name(_CORRUPTED_PREFIX + folder.name))
        self._refresh()

    def discard(self, partial: Path) -> None:
        """Remove what could not be completed."""
        shutil.rmtree(partial, ignore_errors=True)

    def export(self, checkpoint_id: str, job_id: str = "") -> tuple[Path, Manifest]:
        """Write a checkpoint's model as a Hugging Face directory, or the adapter of a job as a peft directory; returns
        its path. Others may be saved meanwhile.

        Raises LemixError (CONFLICT when it holds no adapter of that job), CorruptedCheckpoint or OSError.
        """
        with self._pinned(checkpoint_id) as folder:
            manifest = self.verify(folder)
            names = [*checkpoint_id.split(":"), *([job_id] if job_id else [])]
            target = self._directory / "exports" / "-".join(names)
            self._export(folder, manifest, job_id, target)
        return target, manifest

    def _export(self, folder: Path, manifest: Manifest, job_id: str, target: Path) -> None:
        adapter = next((stored for stored in manifest.adapters if stored["adapter_id"] == job_id), None)
        if job_id and adapter is None:
            message = f"checkpoint {manifest.checkpoint_id} holds no adapter of job {job_id[:200]!r}"
            raise LemixError(ErrorCode.CONFLICT, message, param="job_id")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = self.begin()
        try:
            made = partial / "export"
            made.mkdir()
            if adapter is None:
                export_model(folder, self._model_path, made)
            else:
                export_adapter(folder, self._model_path, AdapterSpec.from_stored(adapter), made)
            with contextlib.suppress(FileNotFoundError):
                os.rename(target, partial / "replaced")
            try:
                os.rename(made, target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # a node beside has just exported the same
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _folder_name(incarnation: int, step: int) -> str:
    return f"{incarnation:010d}-{step:012d}"


def _digest(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return {"sha256": digest.hexdigest(), "bytes": size}
