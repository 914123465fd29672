"""What the commands print."""

from collections.abc import Sequence
from datetime import UTC, datetime

from rich.table import Table

from lemix.types import Checkpoint, ClusterStatus, JobEvent, Model, TrainingJob


def job_table(jobs: Sequence[TrainingJob]) -> Table:
    """One row per job."""
    table = Table("job", "status", "file", "trained", "loss", box=None, pad_edge=False)
    for job in jobs:
        total = job.total_microbatches or "?"
        loss = "-" if job.last_loss is None else f"{job.last_loss:.4f}"
        table.add_row(
            job.job_id, job.status.value, job.training_file or "-", f"{job.trained_microbatches}/{total}", loss
        )
    return table


def checkpoint_table(checkpoints: Sequence[Checkpoint]) -> Table:
    """One row per checkpoint."""
    table = Table("checkpoint", "saved (UTC)", "why", "MB", "micro-batches", "held-out loss", box=None, pad_edge=False)
    for checkpoint in checkpoints:
        loss = "-" if checkpoint.heldout_loss is None else f"{checkpoint.heldout_loss:.4f}"
        saved = datetime.fromtimestamp(checkpoint.created_unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
        trained = ", ".join(f"{job} {count}" for job, count in sorted(checkpoint.trained_microbatches.items()))
        size = f"{checkpoint.size_bytes / 1e6:.1f}"
        table.add_row(checkpoint.checkpoint_id, saved, checkpoint.reason, size, trained or "-", loss)
    return table


def node_table(status: ClusterStatus) -> Table:
    """One row per node."""
    table = Table("node", "ready", "role", "stages", "serving", "training", "weights step", box=None, pad_edge=False)
    for node in status.nodes:
        table.add_row(
            node.node_id,
            "yes" if node.ready else "no",
            node.role,
            str(node.num_stages),
            str(node.inflight_inference),
            str(node.inflight_training),
            str(node.weight_step),
        )
    return table


def status_lines(status: ClusterStatus, models: Sequence[Model]) -> str:
    """The cluster in a few lines."""
    state = "ready" if status.ready else f"not ready: {status.not_ready_reason}"
    served = ", ".join(f"{model.model_id} (context {model.max_context_tokens})" for model in models) or "none"
    lines = [
        f"state    {state}\nmodels   {served}\npolicy   {status.policy or '-'}",
        f"waiting  {status.waiting_inference} requests, {status.waiting_training} micro-batches",
    ]
    if status.predictions:
        errors = [
            f"{item.predicted} {item.error:.1%}{' beside training' if item.beside_training else ''}"
            for item in status.predictions
        ]
        lines.append(f"error    {', '.join(errors)}")
    lines += [
        f"drift    {node.node_id} stage {op.stage} {op.op}: {op.ratio:.2f} times its profile"
        for node in status.nodes
        for op in node.ops
        if op.drifting
    ]
    return "\n".join(lines)


def event_line(event: JobEvent) -> str:
    """One event in one line."""
    level = "" if event.level == "info" else f"{event.level}: "
    loss = "" if event.loss is None else f"  loss {event.loss:.4f}"
    return f"{event.sequence:>5}  {level}{event.message}{loss}"
