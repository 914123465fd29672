"""Messages between a stage worker process and its parent, each pickled behind its length."""

import copyreg
import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from services.node_agent.engine.base import EngineConfig, StageResult
from services.node_agent.engine.handle import Handle
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


@dataclass(frozen=True, slots=True)
class Place:
    """Where a published tensor lies: in memory of `stage`, on its device or on the host, from byte `offset` on."""

    stage: int
    on_device: bool
    offset: int
    sequence: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExportDeviceMemory:
    """Take memory of the device for outputs."""


@dataclass(frozen=True, slots=True)
class OpenDeviceMemory:
    """Open that of the other stages. `exports`: what each stage answered, by stage."""

    exports: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class UseDeviceMemory:
    """Publish outputs there from now on."""


@dataclass(frozen=True, slots=True)
class CloseDeviceMemory:
    """Let go of that of the other stages, because some stage cannot read it."""


@dataclass(frozen=True, slots=True)
class FreeDeviceMemory:
    """Give back one's own, which no other stage has open any more."""


Sharing = ExportDeviceMemory | OpenDeviceMemory | UseDeviceMemory | CloseDeviceMemory | FreeDeviceMemory


@dataclass(frozen=True, slots=True)
class Shared:
    """Answer to a step of sharing. problem: why it failed; empty: it did not."""

    export: bytes = b""
    problem: str = ""


def _reducer(cls: type[Any]) -> Callable[[Any], tuple[Any, ...]]:
    names = [item.name for item in fields(cls)]
    if len(names) == 1:
        value = attrgetter(names[0])
        return lambda instance: (cls, (value(instance),))
    values = attrgetter(*names)
    return lambda instance: (cls, values(instance))


# What travels with every op: a frozen dataclass with slots would look up its fields anew at both ends.
_FREQUENT = (
    Decode,
    Example,
    Handle,
    OptimizerStep,
    Place,
    Prefill,
    PrefillSequence,
    StageResult,
    TrainBackward,
    TrainForward,
)
for _cls in _FREQUENT:
    copyreg.pickle(_cls, _reducer(_cls))
