"""Saves and restores checkpoints of this node, and holds back the ends of micro-batches until one contains them.

A micro-batch whose step is made but in no checkpoint stays unfinished in the ledger. When the node dies, its successor
restores the newest valid checkpoint and finds in the ledger exactly what is missing from it, in order.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as scheduler_pb2
from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.node_agent import metrics
from services.node_agent.checkpoint_files import weights_files
from services.node_agent.checkpoint_report import disk_error, loss_note, to_proto
from services.node_agent.checkpoint_store import (
    CheckpointStore,
    CorruptedCheckpoint,
    Manifest,
    add_to_ranges,
)
from services.node_agent.core.types import Op
from services.node_agent.engine.training_ops import AdapterSpec, OptimizerSpec
from services.node_agent.engine.weight_ops import RestoreCheckpoint, SaveCheckpoint
from services.node_agent.loop import AgentLoop
from services.node_agent.weight_ops import WeightOp
from services.runtime.clock import Clock

_log = structlog.get_logger()

T = TypeVar("T")

#: Jobs whose positions a checkpoint lists, the newest.
_MAX_JOBS = 64
#: Pause after a checkpoint that could not be saved, seconds.
_RETRY_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointLimits:
    """When checkpoints are due. every_steps 0, every_s 0: not for that reason.

    max_unsaved: micro-batches held back; with so many no further one is started. give_up_s: after failing for so long,
    what is held back is finished without a checkpoint.
    """

    every_steps: int
    every_s: float
    max_unsaved: int
    give_up_s: float


@dataclass(slots=True)
class _Job:
    """Steps of a job since the newest checkpoint."""

    every_steps: int
    every_s: float
    steps: int = 0
    last_step: int = -1
    since_s: float | None = None


class Checkpointer:
    """One node's checkpoints. `finish(outcome)` puts an end into the ledger; `report` tells the scheduler."""

    def __init__(
        self,
        *,
        store: CheckpointStore,
        loop: AgentLoop,
        incarnation: int,
        clock: Clock,
        limits: CheckpointLimits,
        finish: Callable[[work_pb2.WorkOutcome], None],
        report: Callable[[scheduler_pb2.CheckpointReport], None],
    ) -> None:
        self._store = store
        self._loop = loop
        self._incarnation = incarnation
        self._clock = clock
        self._limits = limits
        self._finish = finish
        self._report = report
        self._lock = asyncio.Lock()
        self._exporting = asyncio.Lock()
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._jobs: dict[str, _Job] = {}
        #: Trained and in no checkpoint, by task id in the order of their steps.
        self._unsaved: dict[str, work_pb2.WorkOutcome] = {}
        #: In a checkpoint, and not known to be done in the ledger.
        self._unconfirmed: dict[str, work_pb2.WorkOutcome] = {}
        self._positions: dict[str, list[list[int]]] = {}
        #: The newest checkpoint of this incarnation.
        self._saved: Manifest | None = None
        self._failing_since_s: float | None = None
        self._retry_s = 0.0
        #: Why there should be a checkpoint that could not be saved; None: there is none such.
        self._owed: str | None = None
        #: Called when there is room for further micro-batches.
        self.on_room: Callable[[], None] = lambda: None
        #: What the owner must know of the checkpoint the node started from.
        self.note = ""

    # ------------------------------------------------------------- what it holds

    @property
    def num_unsaved(self) -> int:
        """Micro-batches held back."""
        return len(self._unsaved)

    @property
    def is_full(self) -> bool:
        """Whether no further micro-batch may be started before a checkpoint."""
        return len(self._unsaved) >= self._limits.max_unsaved

    def unsaved(self) -> list[work_pb2.WorkOutcome]:
        """Ends that are held back."""
        return list(self._unsaved.values())

    def held(self) -> list[types_pb2.Checkpoint]:
        """Checkpoints on disk, the newest first."""
        return [to_proto(manifest) for manifest in self._store.manifests()]

    # ------------------------------------------------------------- told by the intake and the agent

    def expect(self, work: work_pb2.TrainingWork) -> None:
        """A micro-batch of this job is here."""
        given = work.checkpoint
        every_steps = given.every_steps if given.HasField("every_steps") else self._limits.every_steps
        every_s = given.every_s if given.HasField("every_s") else self._limits.every_s
        job = self._jobs.setdefault(work.job_id, _Job(every_steps, every_s))
        job.every_steps, job.every_s = every_steps, every_s

    def known_outcome(self, task_id: str) -> work_pb2.WorkOutcome | None:
        """The end of a micro-batch whose step the restored weights contain, although the ledger does not know."""
        return self._unconfirmed.get(task_id)

    def confirmed(self, task_id: str) -> None:
        """The ledger holds its end now."""
        self._unconfirmed.pop(task_id, None)

    def hold_back(self, outcome: work_pb2.WorkOutcome) -> None:
        """A micro-batch was trained: its end waits for a checkpoint."""
        training = outcome.training
        self._unsaved[outcome.task_id] = outcome
        job = self._jobs.setdefault(training.job_id, _Job(self._limits.every_steps, self._limits.every_s))
        if training.weight_step != job.last_step:
            job.last_step = training.weight_step
            job.steps += 1
        if job.since_s is None:
            job.since_s = self._clock.monotonic_s()
        self._wake.set()

    def release(self, task_id: str) -> bool:
        """Nobody wants this micro-batch any more; it ends without a checkpoint. False when it is not held back."""
        outcome = self._unsaved.pop(task_id, None)
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
                await self.save_or_owe(self._owed or "interval")

    def _wait_s(self) -> float | None:
        """How long until a checkpoint is due; None: nothing waits for one."""
        if not self._unsaved and self._owed is None:
            return None
        now_s = self._clock.monotonic_s()
        due_s = min((self._due_s(job, now_s) for job in self._jobs.values() if job.steps), default=float("inf"))
        if self.is_full or self._owed is not None:
            due_s = now_s
        due_s = max(due_s, self._retry_s)
        return None if due_s == float("inf") else max(0.0, due_s - now_s)

    def _due_s(self, job: _Job, now_s: float) -> float:
        if 0 < job.every_steps <= job.steps:
            return now_s
        return job.since_s + job.every_s if job.every_s and job.since_s is not None else float("inf")

    async def save_or_owe(self, reason: str) -> None:
        """Save one; if that fails it is reported, and tried again until `give_up_s`."""
        try:
            await self.save(reason)
        except LemixError as error:
            self._report(self._failure("", error))
            self._failed(reason, error)

    def _failed(self, reason: str, error: LemixError) -> None:
        now_s = self._clock.monotonic_s()
        self._retry_s, self._owed = now_s + _RETRY_S, reason
        self._wake.set()
        self._failing_since_s = self._failing_since_s or now_s
        if now_s - self._failing_since_s < self._limits.give_up_s:
            return
        # Training must not stop for ever because of a full disk.
        _log.error("micro-batches end without a checkpoint", count=len(self._unsaved), error=str(error))
        for task_id in list(self._unsaved):
            self.release(task_id)
        self._begin_anew()

    async def save(self, reason: str, request_id: str = "") -> None:
        """Save one, unless there is one of this very version, and report it as the answer to a request.

        Raises LemixError; nothing on disk has changed then.
        """
        async with self._lock:
            version = self._loop.ages.newest_step
            if self._saved is not None and self._saved.step == version and not self._unsaved:
                self._report(self._success(request_id, self._saved))
                self._begin_anew()
                return
            try:
                manifest = await self._save(reason)
            except LemixError as error:
                metrics.CHECKPOINTS.labels("failed").inc()
                _log.error("checkpoint not saved; the ones before are intact", error=str(error))
                raise
            metrics.CHECKPOINTS.labels("saved").inc()
            _log.info(
                "checkpoint saved", checkpoint=manifest.checkpoint_id, reason=reason, size_bytes=manifest.size_bytes
            )
            # Before the ends that waited for it: who hears that a job has ended finds its last checkpoint.
            self._report(self._success(request_id, manifest))
            self._take_over(manifest)

    async def _save(self, reason: str) -> Manifest:
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
            manifest = await _to_its_end(self._store.commit, partial, manifest)
        except OSError as error:
            raise disk_error(error) from error
        finally:
            await asyncio.to_thread(self._store.discard, partial)
        return manifest

    def _manifest(self, step: int, reason: str, adapters: Sequence[AdapterSpec]) -> Manifest:
        contained = [outcome for outcome in self._unsaved.values() if outcome.training.weight_step <= step]
        positions = dict(self._positions)
        for outcome in contained:
            job_id = outcome.training.job_id
            positions[job_id] = add_to_ranges(positions.pop(job_id, []), [outcome.training.sequence])
        unfinished = [*self._unconfirmed.values(), *contained]
        return Manifest(
            node_id=self._loop.node_id,
            incarnation=self._incarnation,
            step=step,
            created_unix_s=self._clock.unix_s(),
            trained_unix_s=self._loop.ages.at(step),
            num_stages=self._loop.num_stages,
            reason=reason,
            model=self._store.model,
            positions=dict(list(positions.items())[-_MAX_JOBS:]),
            outcomes={outcome.task_id: outcome.SerializeToString().hex() for outcome in unfinished},
            jobs={job_id: asdict(spec) for job_id, spec in self._loop.optimizers.items()},
            adapters=[asdict(spec) for spec in adapters],
            steps_unix_s=dict(self._loop.adapters.trained_unix_s),
        )

    def _take_over(self, manifest: Manifest) -> None:
        """What a new checkpoint contains need not be held back any longer."""
        self._saved = manifest
        self._positions = manifest.positions
        contained = [task_id for task_id in manifest.outcomes if task_id in self._unsaved]
        for task_id in contained:
            outcome = self._unconfirmed[task_id] = self._unsaved.pop(task_id)
            self._finish(outcome)
        self._begin_anew()

    def _begin_anew(self) -> None:
        now_s = self._clock.monotonic_s()
        self._failing_since_s, self._retry_s, self._owed = None, 0.0, None
        left = {outcome.training.job_id for outcome in self._unsaved.values()}
        for job_id, job in self._jobs.items():
            job.steps, job.since_s = (1, now_s) if job_id in left else (0, None)
        self._jobs = dict(list(self._jobs.items())[-_MAX_JOBS:])
        self.on_room()

    # ------------------------------------------------------------- restoring

    async def restore_newest(self) -> Manifest | None:
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
            self._positions = manifest.positions
            self._unconfirmed = self._contained_in(manifest)
            self.note = loss_note(corrupted, manifest)
            await self._set_aside(corrupted)
            return manifest
        self.note = loss_note(corrupted, None)
        return None

    def _contained_in(self, manifest: Manifest) -> dict[str, work_pb2.WorkOutcome]:
        """Ends of micro-batches in a checkpoint that the ledger may not know, as this node's own."""
        ends = {}
        for task_id, stored in manifest.outcomes.items():
            ends[task_id] = outcome = work_pb2.WorkOutcome.FromString(bytes.fromhex(stored))
            outcome.node_id = self._loop.node_id
        return ends

    async def _set_aside(self, corrupted: list[Path]) -> None:
        for folder in reversed(corrupted):  # what stays of them is the last, and should be the newest
            try:
                await asyncio.to_thread(self._store.set_aside, folder)
            except OSError as error:
                _log.warning("corrupted checkpoint stays where it is", folder=str(folder), error=str(error))

    async def restore(self, checkpoint_id: str, request_id: str = "") -> None:
        """Go on from a checkpoint, and save that as the newest, so that a crash does not undo it.

        What was trained since counts as trained. Raises LemixError; the weights are as they were then, unless only the
        saving failed.
        """
        async with self._lock:
            folder = self._store.folder_of(checkpoint_id)
            try:
                manifest = await asyncio.to_thread(self._store.verify, folder)
            except CorruptedCheckpoint as error:
                raise LemixError(ErrorCode.CONFLICT, str(error), param="checkpoint_id") from error
            await self._load(folder, manifest)
            for job_id, ranges in manifest.positions.items():
                # Of another node's the positions are new here; one's own contain them.
                numbers = chain.from_iterable(range(first, last + 1) for first, last in ranges)
                self._positions[job_id] = add_to_ranges(self._positions.get(job_id, []), numbers)
            if manifest.node_id != self._loop.node_id:
                self._unconfirmed |= self._contained_in(manifest)
        try:
            await self.save("rollback", request_id)
        except LemixError as error:
            self._failed("rollback", error)
            raise

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

    # ------------------------------------------------------------- commands of the scheduler

    def start(self, command: scheduler_pb2.CheckpointCommand) -> None:
        """Begin what the scheduler asks for; it is told of the end."""
        if len(self._tasks) >= _MAX_JOBS:
            error = LemixError(ErrorCode.OVERLOADED, "too many checkpoint requests are under way on this node")
            self._report(self._failure(command.request_id, error))
            return
        task = asyncio.create_task(self._perform(command))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _perform(self, command: scheduler_pb2.CheckpointCommand) -> None:
        request_id = command.request_id
        try:
            match command.WhichOneof("action"):
                case "save":
                    await self.save(command.save, request_id)
                case "restore":
                    await self.restore(command.restore, request_id)
                case "export":
                    self._report(await self._export(request_id, command.export, command.export_job_id))
                case "keep":
                    await self._keep(command.keep)
                case other:
                    raise LemixError(ErrorCode.UNSUPPORTED, f"unknown checkpoint command {other}")
        except LemixError as error:
            self._report(self._failure(request_id, error))
            if command.HasField("save"):
                self._failed(command.save, error)

    async def _export(self, request_id: str, checkpoint_id: str, job_id: str) -> scheduler_pb2.CheckpointReport:
        try:
            async with self._exporting:
                path, manifest = await asyncio.to_thread(self._store.export, checkpoint_id, job_id)
        except CorruptedCheckpoint as error:
            raise LemixError(ErrorCode.CONFLICT, str(error), param="checkpoint_id") from error
        except OSError as error:
            raise disk_error(error) from error
        report = self._success(request_id, manifest)
        report.path = str(path)
        return report

    async def _keep(self, wanted: scheduler_pb2.KeepCheckpoint) -> None:
        try:
            async with self._lock:  # it removes others
                await _to_its_end(self._store.keep_for, wanted.job_id, wanted.checkpoint_id)
        except OSError as error:
            raise disk_error(error) from error

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

    async def close(self) -> None:
        """Give up what is under way; what is half written is removed at the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _success(self, request_id: str, manifest: Manifest) -> scheduler_pb2.CheckpointReport:
        return scheduler_pb2.CheckpointReport(
            request_id=request_id, checkpoint=to_proto(manifest), held=self.held(), version=self._version()
        )

    def _failure(self, request_id: str, error: LemixError) -> scheduler_pb2.CheckpointReport:
        return scheduler_pb2.CheckpointReport(
            request_id=request_id, error=error.to_proto(), held=self.held(), version=self._version()
        )

    def _version(self) -> types_pb2.WeightVersion:
        step = self._loop.ages.newest_step
        return types_pb2.WeightVersion(node_id=self._loop.node_id, incarnation=self._incarnation, step=step)


async def _to_its_end(work: Callable[..., T], *arguments: Any) -> T:
    """Run blocking work in a thread, also when cancelled: a thread cannot be stopped, and what comes next must not
    touch the same files."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(running)
    finally:
        while not running.done():  # cancelled, perhaps more than once
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([running])
