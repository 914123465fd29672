"""What others are told about checkpoints."""

from pathlib import Path

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.node_agent.checkpoint_store import CorruptedCheckpoint, Manifest, count_of, read_manifest


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
