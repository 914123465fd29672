"""Versioned profile artifacts: one JSON file per version, `<directory>/<fingerprint>/<version>.json`."""

import os
import re
import tempfile
import threading
from pathlib import Path

import structlog

from lemix.internal.v1 import profile_pb2
from services.profile_artifact import ArtifactError, content_hash, load_artifact, write_artifact

_log = structlog.get_logger()

_FINGERPRINT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


class CorruptProfile(ValueError):
    """A stored profile cannot be read; the message names its file and the reason."""


class ProfileStore:
    """Profiles on disk. Files are added and deleted, never changed. Safe for threads, not for two processes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        #: Two nodes may have the same fingerprint, hence the same next version. Held by threads: who cancels a call to
        #: one does not stop it.
        self._changing = threading.Lock()

    def save(self, profile: profile_pb2.Profile) -> profile_pb2.Profile:
        """Store a profile as the next version of its fingerprint; returns it with version, profile_id and content_hash.

        The file appears whole or not at all. Raises ValueError for an unusable fingerprint, OSError for a full disk.
        """
        folder = self._folder(profile.fingerprint)
        stored = profile_pb2.Profile()
        stored.CopyFrom(profile)
        with self._changing:
            folder.mkdir(parents=True, exist_ok=True)
            stored.version = max(self._versions(folder), default=0) + 1
            stored.profile_id = f"{stored.fingerprint}-{stored.version}"
            stored.content_hash = content_hash(stored)
            _write_atomically(folder / f"{stored.version}.json", write_artifact(stored))
        return stored

    def newest(self, fingerprint: str) -> profile_pb2.Profile | None:
        """The newest complete version that can be read; without any the newest incomplete one. None: there is none.

        A file that cannot be read is logged by name and the version before it is used.
        """
        incomplete: profile_pb2.Profile | None = None
        folder = self._folder(fingerprint)
        for version in sorted(self._versions(folder), reverse=True):
            try:
                profile = load_profile(folder / f"{version}.json")
            except CorruptProfile as error:
                _log.error("corrupt profile, trying the version before", error=str(error))
                continue
            if not profile.incomplete_reason:
                return profile
            incomplete = incomplete or profile
        return incomplete

    def get(self, profile_id: str) -> profile_pb2.Profile | None:
        """This profile; None when there is none. Raises ValueError for what is no id, CorruptProfile."""
        path = self._path(profile_id)
        return load_profile(path) if path.is_file() else None

    def delete(self, profile_id: str) -> bool:
        """Delete a profile, readable or not. False when there is none. Raises ValueError for what is no id, OSError."""
        path = self._path(profile_id)
        with self._changing:
            try:
                path.unlink()
            except FileNotFoundError:
                return False
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
        return True

    def all(self, fingerprint: str = "") -> tuple[list[profile_pb2.Profile], list[str]]:
        """Every readable profile (of one fingerprint), newest first, and what is wrong with the other files.

        Raises ValueError for what is no fingerprint.
        """
        if fingerprint:
            folders = [self._folder(fingerprint)]
        else:
            folders = [path for path in self._directory.iterdir() if _FINGERPRINT.fullmatch(path.name)]
        profiles: list[profile_pb2.Profile] = []
        problems: list[str] = []
        for folder in sorted(folders):
            for version in self._versions(folder):
                try:
                    profiles.append(load_profile(folder / f"{version}.json"))
                except CorruptProfile as error:
                    problems.append(str(error))
        profiles.sort(key=lambda profile: (-profile.created_unix_s, profile.fingerprint, -profile.version))
        return profiles, problems

    def _folder(self, fingerprint: str) -> Path:
        if not _FINGERPRINT.fullmatch(fingerprint):
            raise ValueError(f"{fingerprint!r} is not a fingerprint: letters, digits, '.', '_', '-', at most 128")
        return self._directory / fingerprint

    def _path(self, profile_id: str) -> Path:
        if not is_profile_id(profile_id):
            raise ValueError(f"{profile_id!r} is not a profile's id: <fingerprint>-<version>")
        fingerprint, _, version = profile_id.rpartition("-")
        return self._folder(fingerprint) / f"{version}.json"

    @staticmethod
    def _versions(folder: Path) -> list[int]:
        if not folder.is_dir():
            return []
        return [int(path.stem) for path in folder.glob("*.json") if _VERSION.fullmatch(path.stem)]


def is_profile_id(text: str) -> bool:
    """Whether a text has the form of an id, <fingerprint>-<version>."""
    fingerprint, _, version = text.rpartition("-")
    return bool(_VERSION.fullmatch(version) and _FINGERPRINT.fullmatch(fingerprint))


def load_profile(path: Path) -> profile_pb2.Profile:
    """Read one artifact. Raises CorruptProfile naming the file, also when it belongs to another version, when its
    content was changed, and when it has no hash that could tell."""
    try:
        profile = load_artifact(path)
    except ArtifactError as error:
        raise CorruptProfile(str(error)) from error
    if str(profile.version) != path.stem or profile.fingerprint != path.parent.name:
        raise CorruptProfile(f"{path}: holds version {profile.version} of {profile.fingerprint!r}")
    if not any(fit.chosen for fit in profile.fits):
        raise CorruptProfile(f"{path}: holds no chosen latency model")
    return profile


def _write_atomically(path: Path, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
