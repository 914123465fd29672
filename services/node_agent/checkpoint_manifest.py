"""What a checkpoint says of itself: `manifest.json`, with a SHA-256 of every file and of itself."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from services.node_agent.checkpoint_files import flush

MANIFEST_FILE = "manifest.json"
_FORMAT = 1
#: What may differ between two copies of one model.
_VOLATILE_KEYS = frozenset({"_name_or_path", "torch_dtype", "dtype", "transformers_version", "use_cache"})

#: Ascending, disjoint [first, last] pairs.
Ranges = list[list[int]]


class CorruptedCheckpoint(ValueError):
    """A checkpoint whose files are not what was written; the message names the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint is. Times: unix, seconds.

    positions: by job, the micro-batches whose steps it contains, as [first, last] ranges. outcomes: by task id, the
    serialised outcomes of those that the ledger did not hold as done when it was written.
    """

    node_id: str
    incarnation: int
    step: int
    created_unix_s: float
    trained_unix_s: float | None
    num_stages: int
    reason: str
    model: dict[str, Any]
    positions: dict[str, Ranges] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)
    #: Optimizer settings of the jobs whose state it holds.
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: Adapters it holds, as AdapterSpec.
    adapters: list[dict[str, Any]] = field(default_factory=list)
    #: When the newest step of each was made, unix time in seconds; of the weights below them under no name.
    steps_unix_s: dict[str, float] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def checkpoint_id(self) -> str:
        """The weights version it holds: node, incarnation and step."""
        return f"{self.node_id}:{self.incarnation}:{self.step}"

    @property
    def holds_weights(self) -> bool:
        """Whether the weights below its adapters are other than those of the model directory, and so in it."""
        return any(name.startswith("model-") for name in self.files)

    @property
    def size_bytes(self) -> int:
        """Size of its files."""
        return sum(int(file["bytes"]) for file in self.files.values())


def model_identity(model_path: Path) -> dict[str, Any]:
    """What makes two models exchangeable: their configuration and tokenizer. Raises OSError or ValueError."""
    config = json.loads((model_path / "config.json").read_text(encoding="utf-8"))
    identity = {key: value for key, value in sorted(config.items()) if key not in _VOLATILE_KEYS}
    tokenizer = model_path / "tokenizer.json"
    if tokenizer.is_file():
        identity["tokenizer.json"] = hashlib.sha256(tokenizer.read_bytes()).hexdigest()[:16]
    return identity


def model_differences(stored: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """One phrase per property that differs; empty: the same model."""
    keys = sorted(stored.keys() | mine.keys())
    return [f"{key} is {stored.get(key)!r}, here {mine.get(key)!r}" for key in keys if stored.get(key) != mine.get(key)]


def read_manifest(folder: Path) -> Manifest:
    """What a checkpoint says of itself. Raises CorruptedCheckpoint."""
    try:
        content = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        if content["format"] != _FORMAT or content["sha256"] != _manifest_digest(content["manifest"]):
            raise ValueError("it is not what was written")
        return Manifest(**content["manifest"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptedCheckpoint(f"checkpoint {folder}: {MANIFEST_FILE}: {error}") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Store it, durably. Raises OSError."""
    fields = asdict(manifest)
    content = {"format": _FORMAT, "sha256": _manifest_digest(fields), "manifest": fields}
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    flush(path)
    flush(folder)


def _manifest_digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def add_to_ranges(ranges: Ranges, numbers: Iterable[int]) -> Ranges:
    """The ranges of all numbers in `ranges` and `numbers`."""
    pairs = sorted([*ranges, *([number, number] for number in numbers)])
    joined: Ranges = []
    for first, last in pairs:
        if joined and first <= joined[-1][1] + 1:
            joined[-1][1] = max(joined[-1][1], last)
        else:
            joined.append([first, last])
    return joined


def count_of(ranges: Ranges) -> int:
    """Numbers in the ranges."""
    return sum(last - first + 1 for first, last in ranges)
