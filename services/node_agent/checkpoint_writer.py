"""Writes a checkpoint: one version of every stage's weights, and a manifest of what they contain."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict

from lemix.errors import ErrorCode, LemixError
from services.node_agent.checkpoint_coverage import CheckpointCoverage
from services.node_agent.checkpoint_manifest import Manifest
from services.node_agent.checkpoint_report import disk_error
from services.node_agent.checkpoint_store import CheckpointStore
from services.node_agent.core.types import Op
from services.node_agent.engine.training_ops import AdapterSpec
from services.node_agent.engine.weight_ops import SaveCheckpoint
from services.node_agent.loop import AgentLoop
from services.node_agent.threads import to_its_end
from services.node_agent.weight_ops import WeightOp
from services.runtime.clock import Clock


class CheckpointWriter:
    """Writes one checkpoint at a time into a store."""

    def __init__(
        self,
        store: CheckpointStore,
        loop: AgentLoop,
        coverage: CheckpointCoverage,
        *,
        incarnation: int,
        clock: Clock,
    ) -> None:
        self._store = store
        self._loop = loop
        self._coverage = coverage
        self._incarnation = incarnation
        self._clock = clock

    async def write(self, reason: str) -> Manifest:
        """Write one of the weights as they are. Raises LemixError; nothing on disk has changed then."""
        try:
            partial = await asyncio.to_thread(self._store.begin)
        except OSError as error:
            raise disk_error(error) from error
        try:
            adapters: list[AdapterSpec] = []

            def payload(op: Op) -> SaveCheckpoint:
                if not weight_op.results:  # for stage 0: every stage has the adapters of the steps so far
                    adapters[:] = self._loop.adapters.held.values()
                    weight_op.adapter_ids = tuple(spec.adapter_id for spec in adapters)
                return SaveCheckpoint(op.op_id, op.version, str(partial), tuple(adapters))

            weight_op = WeightOp(False, payload)
            await self._loop.run_weight_op("checkpoint", weight_op)
            for stage, result in enumerate(weight_op.results):
                if result.error:
                    message = f"stage {stage} could not write its part: {result.error[:200]}"
                    raise LemixError(ErrorCode.RESOURCE_EXHAUSTED, message)
            manifest = self._manifest(weight_op.version, reason, adapters)
            manifest = await to_its_end(self._store.commit, partial, manifest)
        except OSError as error:
            raise disk_error(error) from error
        finally:
            await asyncio.to_thread(self._store.discard, partial)
        return manifest

    def _manifest(self, step: int, reason: str, adapters: Sequence[AdapterSpec]) -> Manifest:
        positions, outcomes = self._coverage.at(step)
        return Manifest(
            node_id=self._loop.node_id,
            incarnation=self._incarnation,
            step=step,
            created_unix_s=self._clock.unix_s(),
            trained_unix_s=self._loop.ages.at(step),
            num_stages=self._loop.num_stages,
            reason=reason,
            model=self._store.model,
            positions=positions,
            outcomes=outcomes,
            jobs={job_id: asdict(spec) for job_id, spec in self._loop.optimizers.items()},
            adapters=[asdict(spec) for spec in adapters],
            steps_unix_s=dict(self._loop.adapters.trained_unix_s),
        )
