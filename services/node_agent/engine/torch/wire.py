"""Messages between a stage worker process and its parent, each pickled behind its length."""

import struct
from dataclasses import dataclass
from pathlib import Path

from services.node_agent.engine.base import EngineConfig
from services.node_agent.engine.torch.load import ModelSpec

#: Length of the message that follows, bytes.
FRAME = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker needs to start. `arena_fds`: inherited shared memory files, by stage."""

    config: EngineConfig
    spec: ModelSpec
    stage: int
    arena_fds: list[int]
    snapshot_folder: Path


@dataclass(frozen=True, slots=True)
class Ready:
    """The stage is loaded."""


@dataclass(frozen=True, slots=True)
class StartFailed:
    """The stage could not be loaded. kind: the exception's type name."""

    kind: str
    message: str
