"""Messages between a stage worker process and its parent, each pickled behind its length."""

import copyreg
import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from services.node_agent.engine.base import EngineConfig, StageResult
from services.node_agent.engine.inference_ops import Decode, Prefill, PrefillSequence
from services.node_agent.engine.torch.load import ModelSpec
from services.node_agent.engine.training_ops import Example, OptimizerStep, TrainBackward, TrainForward

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
    """The stage is loaded. What a token takes on it, bytes: in the KV cache, and saved for the backward (0: not
    measured)."""

    kv_bytes_per_token: int
    activation_bytes_per_token: int


@dataclass(frozen=True, slots=True)
class StartFailed:
    """The stage could not be loaded. kind: the exception's type name."""

    kind: str
    message: str


def _reducer(cls: type[Any]) -> Callable[[Any], tuple[Any, ...]]:
    values = attrgetter(*(item.name for item in fields(cls)))
    return lambda instance: (cls, values(instance))


# What travels with every op: a frozen dataclass with slots would look up its fields anew at both ends.
for _cls in (Decode, Example, OptimizerStep, Prefill, PrefillSequence, StageResult, TrainBackward, TrainForward):
    copyreg.pickle(_cls, _reducer(_cls))
