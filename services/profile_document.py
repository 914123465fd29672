"""Profile artifacts as files and JSON documents, without protobuf: which are refused, and in which words."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.latency.artifact import HASH_FIELD, document_hash

_REMEDY = "make it again, or take the original"


class ArtifactError(ValueError):
    """A profile that has no hash or was changed after it was written; the message is one line."""


class NotAProfile(ArtifactError):
    """Something else than a profile; the message is the reason, for `in_file` with the file."""


def read_text(path: Path) -> str:
    """What is in a file. Raises NotAProfile naming it."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise in_file(path, NotAProfile("there is no such file")) from error
    except IsADirectoryError as error:
        raise in_file(path, NotAProfile("it is a directory")) from error
    except OSError as error:
        raise in_file(path, NotAProfile(error.strerror or type(error).__name__)) from error
    except UnicodeDecodeError as error:
        raise in_file(path, NotAProfile("it is not text")) from error


def read_document(text: str) -> dict[str, Any]:
    """The JSON object in a text, fields unchecked. Raises NotAProfile for what has no latency models at all."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise NotAProfile(f"it is not JSON: {error.msg} at line {error.lineno} column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise NotAProfile("it is not JSON that can be read") from error
    if not isinstance(document, dict):
        raise NotAProfile("it is JSON, but not an object")
    if not document.get("fits"):
        raise NotAProfile("it holds no latency models ('fits')")
    return document


def check_content(document: Mapping[str, Any]) -> None:
    """Raises ArtifactError for a profile's document without a hash, or with one that is not that of its content."""
    written = document.get(HASH_FIELD)
    if not written:
        raise ArtifactError(f"has no {HASH_FIELD}, so nothing tells whether it was changed: {_REMEDY}")
    if written != document_hash(document):
        raise ArtifactError(
            f"the content does not match {HASH_FIELD} {str(written)[:12]}: "
            f"the file was changed after it was written; {_REMEDY}"
        )


def in_file(path: Path, error: ArtifactError) -> ArtifactError:
    """The same error, naming the file."""
    if isinstance(error, NotAProfile):
        return NotAProfile(f"{path} is not a profile: {error}")
    return ArtifactError(f"{path}: {error}")
