"""What others are told about checkpoints."""

from collections.abc import Callable
from pathlib import Path

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as scheduler_pb2
from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.node_agent.checkpoint_manifest import CorruptedCheckpoint, Manifest, count_of, read_manifest
from services.node_agent.checkpoint_store import CheckpointStore
from services.node_agent.loop import AgentLoop


class CheckpointReports:
    """Tells the scheduler, by `send`, what became of a checkpoint and which ones the node holds then.

    request_id: of the command that a report answers; empty: the node did it by itself.
    """

    def __init__(
        self,
        store: CheckpointStore,
        loop: AgentLoop,
        incarnation: int,
        send: Callable[[scheduler_pb2.CheckpointReport], None],
    ) -> None:
        self._store = store
        self._loop = loop
        self._incarnation = incarnation
        self._send = send

    def held(self) -> list[types_pb2.Checkpoint]:
        """Checkpoints on disk, the newest first."""
        return [to_proto(manifest) for manifest in self._store.manifests()]

    def success(self, request_id: str, manifest: Manifest, *, path: str = "") -> None:
        """This one was saved, or exported to `path`."""
        report = self._report(request_id)
        report.checkpoint.CopyFrom(to_proto(manifest))
        report.path = path
        self._send(report)

    def failure(self, request_id: str, error: LemixError) -> None:
        """It could not be done."""
        report = self._report(request_id)
        report.error.CopyFrom(error.to_proto())
        self._send(report)

    def _report(self, request_id: str) -> scheduler_pb2.CheckpointReport:
        step = self._loop.ages.newest_step
        version = types_pb2.WeightVersion(node_id=self._loop.node_id, incarnation=self._incarnation, step=step)
        return scheduler_pb2.CheckpointReport(request_id=request_id, held=self.held(), version=version)


def to_proto(manifest: Manifest) -> types_pb2.Checkpoint:
    """The public form."""
    return types_pb2.Checkpoint(
        checkpoint_id=manifest.checkpoint_id,
        node_id=manifest.node_id,
        created_unix_s=manifest.created_unix_s,
        size_bytes=manifest.size_bytes,
        trained_microbatches={job_id: count_of(ranges) for job_id, ranges in manifest.positions.items()},
        reason=manifest.reason,
    )


def loss_note(corrupted: list[Path], used: Manifest | None) -> str:
    """What a start from an older checkpoint means; empty when it was the newest."""
    if not corrupted:
        return ""
    source = f"it started from {used.checkpoint_id}" if used is not None else "it started from its model directory"
    lost: dict[str, int] = {}
    try:
        newest = read_manifest(corrupted[0])
        for job_id, ranges in newest.positions.items():
            before = used.positions.get(job_id, []) if used is not None else []
            lost[job_id] = count_of(ranges) - count_of(before)
        # Those that the ledger does not hold as done are trained again.
        again = [work_pb2.WorkOutcome.FromString(bytes.fromhex(item)) for item in newest.outcomes.values()]
        of_jobs = ", ".join(f"{count} of {job_id}" for job_id, count in lost.items() if count)
        what = f"lost unless trained again: {of_jobs or 'none'}; {len(again)} of them are in the ledger"
    except CorruptedCheckpoint:
        what = "its list of micro-batches is corrupted as well"
    return f"checkpoint {corrupted[0].name} is corrupted, {source}; micro-batches {what}"


def disk_error(error: OSError) -> LemixError:
    """What whoever waits for a checkpoint is told. RESOURCE_EXHAUSTED."""
    return LemixError(ErrorCode.RESOURCE_EXHAUSTED, f"cannot write a checkpoint: {error.strerror or error}")
