"""Versioned profile artifacts: one JSON file per version, `<directory>/<fingerprint>/<version>.json`."""

import os
import re
import tempfile
from pathlib import Path

import structlog
from google.protobuf import json_format

from lemix.internal.v1 import profile_pb2

_log = structlog.get_logger()

_FINGERPRINT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


class CorruptProfile(ValueError):
    """A stored profile cannot be read; the message names its file and the reason."""


class ProfileStore:
    """Profiles on disk. Files are never changed, only added; not safe for two processes on one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def save(self, profile: profile_pb2.Profile) -> profile_pb2.Profile:
        """Store a profile as the next version of its fingerprint; returns it with `version` and `profile_id` set.

        The file appears whole or not at all. Raises ValueError for an unusable fingerprint, OSError for a full disk.
        """
        folder = self._folder(profile.fingerprint)
        folder.mkdir(parents=True, exist_ok=True)
        stored = profile_pb2.Profile()
        stored.CopyFrom(profile)
        stored.version = max(self._versions(folder), default=0) + 1
        stored.profile_id = f"{stored.fingerprint}-{stored.version}"
        text = json_format.MessageToJson(stored, preserving_proto_field_name=True)
        _write_atomically(folder / f"{stored.version}.json", text)
        return stored

    def newest(self, fingerprint: str) -> profile_pb2.Profile | None:
        """The newest readable version; None when there is none.

        A file that cannot be read is logged by name and the version before it is used.
        """
        folder = self._folder(fingerprint)
        for version in sorted(self._versions(folder), reverse=True):
            try:
                return load_profile(folder / f"{version}.json")
            except CorruptProfile as error:
                _log.error("corrupt profile, trying the version before", error=str(error))
        return None

    def _folder(self, fingerprint: str) -> Path:
        if not _FINGERPRINT.fullmatch(fingerprint):
            raise ValueError(f"{fingerprint!r} is not a fingerprint: letters, digits, '.', '_', '-', at most 128")
        return self._directory / fingerprint

    @staticmethod
    def _versions(folder: Path) -> list[int]:
        if not folder.is_dir():
            return []
        return [int(path.stem) for path in folder.glob("*.json") if _VERSION.fullmatch(path.stem)]


def load_profile(path: Path) -> profile_pb2.Profile:
    """Read one artifact. Raises CorruptProfile naming the file, also when it belongs to another version."""
    try:
        profile = json_format.Parse(path.read_text(encoding="utf-8"), profile_pb2.Profile())
    except (OSError, UnicodeDecodeError, json_format.ParseError) as error:
        raise CorruptProfile(f"{path}: {error}") from error
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
