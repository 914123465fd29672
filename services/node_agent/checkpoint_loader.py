"""Loads checkpoints into all stages: the newest valid one at the start, or one that is asked for."""

import asyncio
from pathlib import Path

import structlog

from lemix.errors import ErrorCode, LemixError
from services.node_agent import metrics
from services.node_agent.checkpoint_coverage import CheckpointCoverage
from services.node_agent.checkpoint_manifest import CorruptedCheckpoint, Manifest
from services.node_agent.checkpoint_report import loss_note
from services.node_agent.checkpoint_store import CheckpointStore
from services.node_agent.engine.training_ops import AdapterSpec, OptimizerSpec
from services.node_agent.engine.weight_ops import RestoreCheckpoint
from services.node_agent.loop import AgentLoop
from services.node_agent.weight_ops import WeightOp

_log = structlog.get_logger()


class CheckpointLoader:
    """Loads one checkpoint at a time from a store."""

    def __init__(self, store: CheckpointStore, loop: AgentLoop, coverage: CheckpointCoverage) -> None:
        self._store = store
        self._loop = loop
        self._coverage = coverage
        #: What the owner must know of the checkpoint the node started from.
        self.note = ""

    async def load_newest(self) -> Manifest | None:
        """At the start: go on from the newest valid checkpoint; corrupted ones are set aside, and said.

        Raises LemixError CONFLICT when the newest is of another model, INTERNAL when it cannot be loaded.
        """
        corrupted: list[Path] = []
        for folder in self._store.folders():
            try:
                manifest = await asyncio.to_thread(self._store.verify, folder)
            except CorruptedCheckpoint as error:
                _log.error("corrupted checkpoint, using the one before", error=str(error))
                corrupted.append(folder)
                continue
            await self._load(folder, manifest)
            self._coverage.start_from(manifest)
            self.note = loss_note(corrupted, manifest)
            await self._set_aside(corrupted)
            return manifest
        self.note = loss_note(corrupted, None)
        return None

    async def _set_aside(self, corrupted: list[Path]) -> None:
        for folder in reversed(corrupted):  # what stays of them is the last, and should be the newest
            try:
                await asyncio.to_thread(self._store.set_aside, folder)
            except OSError as error:
                _log.warning("corrupted checkpoint stays where it is", folder=str(folder), error=str(error))

    async def load(self, checkpoint_id: str) -> None:
        """Go on from this one. Raises LemixError; the weights are as they were then."""
        folder = self._store.folder_of(checkpoint_id)
        try:
            manifest = await asyncio.to_thread(self._store.verify, folder)
        except CorruptedCheckpoint as error:
            raise LemixError(ErrorCode.CONFLICT, str(error), param="checkpoint_id") from error
        await self._load(folder, manifest)
        self._coverage.go_on_from(manifest)

    async def _load(self, folder: Path, manifest: Manifest) -> None:
        weight_op = WeightOp(
            True,
            lambda op: RestoreCheckpoint(op.op_id, op.version, str(folder), op.oldest_version),
            lambda before: manifest.trained_unix_s,
            settles=True,
        )
        await self._loop.run_weight_op("restore", weight_op)
        for stage, result in enumerate(weight_op.results):
            if result.error:
                raise LemixError(ErrorCode.INTERNAL, f"stage {stage} could not load its part: {result.error[:200]}")
        specs = {
            job_id: OptimizerSpec(**{**spec, "betas": tuple(spec["betas"])}) for job_id, spec in manifest.jobs.items()
        }
        self._loop.adopt_optimizers(specs)
        adapters = [AdapterSpec.from_stored(stored) for stored in manifest.adapters]
        changed = manifest.holds_weights
        self._loop.adopt_adapters(adapters, weights_changed=changed, trained_unix_s=manifest.steps_unix_s)
        metrics.CHECKPOINTS.labels("restored").inc()
        _log.info("checkpoint restored", checkpoint=manifest.checkpoint_id, version=weight_op.version + 1)
