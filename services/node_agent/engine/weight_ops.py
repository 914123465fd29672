"""Ops that read or change a stage's weights as a whole: snapshots, synchronisation, checkpoints."""

from dataclasses import dataclass

from services.node_agent.engine.training_ops import AdapterSpec

#: Between the id of a round of synchronisation and the part of the weights that a snapshot holds.
PART_SEPARATOR = "#"


def round_of(sync_id: str) -> str:
    """The round that a snapshot is of."""
    return sync_id.partition(PART_SEPARATOR)[0]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Copy this stage's weights of `version`, or of an adapter alone, aside under a name; peers read them through
    `StageResult.weights_path`."""

    op_id: int
    version: int
    sync_id: str
    adapter: AdapterSpec | None = None


@dataclass(frozen=True, slots=True)
class LoadWeights:
    """Change this stage's weights; the version rises by one, also when the result has an error (weights unchanged).

    path: safetensors file with full-model parameter names. mode "replace": take them over. mode "average": the file
    holds the mean of all snapshots; weights += mean - own snapshot of `sync_id`, so that steps made meanwhile are kept.
    oldest_version: as for OptimizerStep. adapter: its weights alone are changed; it is made if it is not there.
    """

    op_id: int
    version: int
    sync_id: str
    path: str
    mode: str
    oldest_version: int | None = None
    adapter: AdapterSpec | None = None


@dataclass(frozen=True, slots=True)
class SaveCheckpoint:
    """Write this stage's weights, adapters, optimizer states, schedules and random state into `folder`, which exists;
    the names are those of `checkpoint_files`. Weights that are as in the model directory are left out. Only for the
    stage's current version: optimizer states of older ones are not kept.
    """

    op_id: int
    version: int
    folder: str
    #: Those that all stages have.
    adapters: tuple[AdapterSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class RestoreCheckpoint:
    """Take over what a checkpoint holds, whatever number of stages wrote it; the version rises by one, also when the
    result has an error (nothing changed). oldest_version: as for OptimizerStep.
    """

    op_id: int
    version: int
    folder: str
    oldest_version: int | None = None
