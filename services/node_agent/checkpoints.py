"""Saves and restores checkpoints of this node, and holds back the ends of micro-batches until one contains them.

A micro-batch whose step is made but in no checkpoint stays unfinished in the ledger. When the node dies, its successor
restores the newest valid checkpoint and finds in the ledger exactly what is missing from it, in order.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as scheduler_pb2
from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.node_agent import metrics
from services.node_agent.checkpoint_coverage import CheckpointCoverage
from services.node_agent.checkpoint_files import weights_files
from services.node_agent.checkpoint_loader import CheckpointLoader
from services.node_agent.checkpoint_manifest import CorruptedCheckpoint, Manifest
from services.node_agent.checkpoint_report import CheckpointReports, disk_error
from services.node_agent.checkpoint_schedule import CheckpointLimits, CheckpointSchedule
from services.node_agent.checkpoint_store import CheckpointStore
from services.node_agent.checkpoint_writer import CheckpointWriter
from services.node_agent.loop import AgentLoop
from services.node_agent.threads import to_its_end
from services.runtime.clock import Clock

_log = structlog.get_logger()


class Checkpointer:
    """One node's checkpoints. `finish(outcome)` puts an end into the ledger; `reports` go to the scheduler."""

    def __init__(
        self,
        *,
        store: CheckpointStore,
        loop: AgentLoop,
        incarnation: int,
        clock: Clock,
        limits: CheckpointLimits,
        finish: Callable[[work_pb2.WorkOutcome], None],
        reports: CheckpointReports,
    ) -> None:
        self._store = store
        self._loop = loop
        self._clock = clock
        self._finish = finish
        self._reports = reports
        self._schedule = CheckpointSchedule(limits)
        self._coverage = CheckpointCoverage(loop.node_id)
        self._writer = CheckpointWriter(store, loop, self._coverage, incarnation=incarnation, clock=clock)
        self._loader = CheckpointLoader(store, loop, self._coverage)
        self._lock = asyncio.Lock()
        self._wake = asyncio.Event()
        #: The newest checkpoint of this incarnation.
        self._saved: Manifest | None = None
        #: Called when there is room for further micro-batches.
        self.on_room: Callable[[], None] = lambda: None

    # ------------------------------------------------------------- what it holds

    @property
    def num_unsaved(self) -> int:
        """Micro-batches held back."""
        return self._coverage.num_unsaved

    @property
    def is_full(self) -> bool:
        """Whether no further micro-batch may be started before a checkpoint."""
        return self._schedule.is_full(self.num_unsaved)

    @property
    def note(self) -> str:
        """What the owner must know of the checkpoint the node started from."""
        return self._loader.note

    def unsaved(self) -> list[work_pb2.WorkOutcome]:
        """Ends that are held back."""
        return self._coverage.unsaved()

    def held(self) -> list[types_pb2.Checkpoint]:
        """Checkpoints on disk, the newest first."""
        return self._reports.held()

    # ------------------------------------------------------------- told by the intake and the agent

    def expect(self, work: work_pb2.TrainingWork) -> None:
        """A micro-batch of this job is here."""
        self._schedule.expect(work)

    def known_outcome(self, task_id: str) -> work_pb2.WorkOutcome | None:
        """The end of a micro-batch whose step the restored weights contain, although the ledger does not know."""
        return self._coverage.known_outcome(task_id)

    def confirmed(self, task_id: str) -> None:
        """The ledger holds its end now."""
        self._coverage.confirmed(task_id)

    def hold_back(self, outcome: work_pb2.WorkOutcome) -> None:
        """A micro-batch was trained: its end waits for a checkpoint."""
        training = outcome.training
        self._coverage.trained(outcome)
        self._schedule.trained(training.job_id, training.weight_step, self._clock.monotonic_s())
        self._wake.set()

    def release(self, task_id: str) -> bool:
        """Nobody wants this micro-batch any more; it ends without a checkpoint. False when it is not held back."""
        outcome = self._coverage.drop(task_id)
        if outcome is None:
            return False
        self._finish(outcome)
        self.on_room()
        return True

    # ------------------------------------------------------------- saving

    async def run(self) -> None:
        """Save whenever a checkpoint is due, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(self._wait_s()):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            if self._wait_s() == 0.0:
                await self.save_or_owe(self._schedule.reason)

    def _wait_s(self) -> float | None:
        return self._schedule.wait_s(self._clock.monotonic_s(), self.num_unsaved)

    async def save_or_owe(self, reason: str, request_id: str = "") -> None:
        """Save one; if that fails it is reported, and tried again until `give_up_s`."""
        try:
            await self.save(reason, request_id)
        except LemixError as error:
            self._reports.failure(request_id, error)
            self._failed(reason, error)

    def _failed(self, reason: str, error: LemixError) -> None:
        gives_up = self._schedule.failed(reason, self._clock.monotonic_s())
        self._wake.set()
        if not gives_up:
            return
        # Training must not stop for ever because of a full disk.
        _log.error("micro-batches end without a checkpoint", count=self.num_unsaved, error=str(error))
        for outcome in self.unsaved():
            self.release(outcome.task_id)
        self._begin_anew()

    async def save(self, reason: str, request_id: str = "") -> None:
        """Save one, unless there is one of this very version, and report it as the answer to a request.

        Raises LemixError; nothing on disk has changed then.
        """
        async with self._lock:
            version = self._loop.ages.newest_step
            if self._saved is not None and self._saved.step == version and not self.num_unsaved:
                self._reports.success(request_id, self._saved)
                self._begin_anew()
                return
            try:
                manifest = await self._writer.write(reason)
            except LemixError as error:
                metrics.CHECKPOINTS.labels("failed").inc()
                _log.error("checkpoint not saved; the ones before are intact", error=str(error))
                raise
            metrics.CHECKPOINTS.labels("saved").inc()
            _log.info(
                "checkpoint saved", checkpoint=manifest.checkpoint_id, reason=reason, size_bytes=manifest.size_bytes
            )
            # Before the ends that waited for it: who hears that a job has ended finds its last checkpoint.
            self._reports.success(request_id, manifest)
            self._saved = manifest
            for outcome in self._coverage.saved(manifest):
                self._finish(outcome)
            self._begin_anew()

    def _begin_anew(self) -> None:
        self._schedule.begin_anew(self._coverage.unsaved_jobs, self._clock.monotonic_s())
        self.on_room()

    async def keep(self, wanted: scheduler_pb2.KeepCheckpoint) -> None:
        """Keep a checkpoint for a job, whatever its age. Raises LemixError."""
        try:
            async with self._lock:  # it removes others
                await to_its_end(self._store.keep_for, wanted.job_id, wanted.checkpoint_id)
        except OSError as error:
            raise disk_error(error) from error

    # ------------------------------------------------------------- restoring

    async def restore_newest(self) -> Manifest | None:
        """At the start: see CheckpointLoader.load_newest."""
        return await self._loader.load_newest()

    async def restore(self, checkpoint_id: str, request_id: str = "") -> None:
        """Go on from a checkpoint, and save that as the newest, so that a crash does not undo it.

        What was trained since counts as trained. Raises LemixError; the weights are as they were then, unless only the
        saving failed.
        """
        async with self._lock:
            await self._loader.load(checkpoint_id)
        try:
            await self.save("rollback", request_id)
        except LemixError as error:
            self._failed("rollback", error)
            raise

    def replica(self, checkpoint_id: str) -> tuple[list[Path], float | None]:
        """Files with the weights of a checkpoint, and when their newest step was made (unix, seconds; None: never).

        Raises LemixError NOT_FOUND, CONFLICT (corrupted).
        """
        folder = self._store.folder_of(checkpoint_id)
        try:
            manifest = self._store.manifest_in(folder)
            if not manifest.holds_weights:
                message = f"the weights of checkpoint {checkpoint_id} are those of the model directory"
                raise LemixError(ErrorCode.CONFLICT, message, param="checkpoint_id")
            return weights_files(folder), manifest.trained_unix_s
        except CorruptedCheckpoint as error:
            raise LemixError(ErrorCode.CONFLICT, str(error), param="checkpoint_id") from error
