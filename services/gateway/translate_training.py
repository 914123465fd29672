"""Between OpenAI's JSON and the application layer: files, jobs, events and feedback."""

import math
from typing import Any, TypeVar

from google.protobuf.message import Message
from pydantic import BaseModel

from lemix.errors import LemixError
from lemix.internal.v1 import work_pb2
from lemix.v1 import training_service_pb2, types_pb2
from services.gateway.schemas import (
    FeedbackBody,
    HyperparametersBody,
    JobBody,
)
from services.gateway.training_examples import ExampleBuilder
from services.gateway.translate import turns
from services.gateway.validation import invalid

_Message = TypeVar("_Message", bound=Message)

#: What `learning_rate_multiplier: 1` means.
BASE_LEARNING_RATE = 1e-4
_JOB_STATUS = {
    types_pb2.JOB_STATUS_QUEUED: "queued",
    types_pb2.JOB_STATUS_RUNNING: "running",
    types_pb2.JOB_STATUS_SUCCEEDED: "succeeded",
    types_pb2.JOB_STATUS_FAILED: "failed",
    types_pb2.JOB_STATUS_CANCELLED: "cancelled",
    types_pb2.JOB_STATUS_PAUSED: "paused",
}


_METHODS = {
    types_pb2.TRAINING_METHOD_UNSPECIFIED: "full",
    types_pb2.TRAINING_METHOD_FULL: "full",
    types_pb2.TRAINING_METHOD_LORA: "lora",
}
_METHOD_OF_NAME = {
    None: types_pb2.TRAINING_METHOD_UNSPECIFIED,
    "full": types_pb2.TRAINING_METHOD_FULL,
    "lora": types_pb2.TRAINING_METHOD_LORA,
}
_MODE_OF_NAME = {"online": types_pb2.TRAINING_MODE_ONLINE, "isolated": types_pb2.TRAINING_MODE_ISOLATED}
_MODES = {
    types_pb2.TRAINING_MODE_UNSPECIFIED: "online",
    types_pb2.TRAINING_MODE_ONLINE: "online",
    types_pb2.TRAINING_MODE_ISOLATED: "isolated",
}


def file_object(file: work_pb2.FileRecord) -> dict[str, Any]:
    """OpenAI's file object. A stored file is validated and tokenised already."""
    return {
        "id": file.file_id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": int(file.created_unix_s),
        "filename": file.filename,
        "purpose": "fine-tune",
        "status": "processed",
        "lemix": {
            "num_examples": file.num_examples,
            "max_tokens": file.max_tokens,
            "num_skipped": file.num_skipped,
            "num_truncated": file.num_truncated,
        },
    }


def job_request(body: JobBody, request_id: str) -> training_service_pb2.CreateJobRequest:
    """Raises UNSUPPORTED, INVALID_REQUEST (also for values that contradict each other)."""
    body.check_extra()
    in_method = body.method.supervised.hyperparameters if body.method and body.method.supervised else None
    if body.hyperparameters is not None and in_method is not None:
        raise invalid("give hyperparameters or method.supervised.hyperparameters, not both", "hyperparameters")
    return training_service_pb2.CreateJobRequest(
        model=body.model,
        training_file=body.training_file,
        hyperparameters=_hyperparameters(body, body.hyperparameters or in_method or HyperparametersBody()),
        request_id=request_id,
        checkpoint=_message(types_pb2.CheckpointPolicy, body.lemix.checkpoint, "checkpoint"),
        validation_file=body.validation_file or "",
        quality_gate=_message(types_pb2.QualityGate, body.lemix.quality_gate, "quality_gate"),
        method=_METHOD_OF_NAME[body.lemix.method],
        mode=_MODE_OF_NAME[body.lemix.kind],
        lora=_message(types_pb2.Lora, body.lemix.lora, "lora"),
    )


def _message(kind: type[_Message], body: BaseModel | None, field: str) -> _Message | None:
    """What the caller wrote in `lemix.<field>`, as a message."""
    if body is None:
        return None
    try:
        return kind(**body.model_dump(exclude_none=True))
    except ValueError as error:  # a number outside its protobuf type
        raise invalid(f"lemix.{field} is out of range: {error}", f"lemix.{field}") from error


def _hyperparameters(body: JobBody, openai: HyperparametersBody) -> types_pb2.Hyperparameters:
    extras = {"kind", "method", "lora", "checkpoint", "quality_gate"}
    values: dict[str, Any] = body.lemix.model_dump(exclude=extras, exclude_none=True)
    multiplier = openai.learning_rate_multiplier
    if multiplier not in (None, "auto"):
        if "learning_rate" in values:
            raise invalid("give learning_rate_multiplier or lemix.learning_rate, not both", "lemix.learning_rate")
        values["learning_rate"] = BASE_LEARNING_RATE * float(multiplier or 0)
    for name, value in (("num_epochs", openai.n_epochs), ("batch_size", openai.batch_size)):
        if value not in (None, "auto"):
            values[name] = value
    try:
        return types_pb2.Hyperparameters(**values)
    except ValueError as error:  # a number outside its protobuf type
        raise invalid(f"a hyperparameter is out of range: {error}", "hyperparameters") from error


def job_object(job: types_pb2.TrainingJob) -> dict[str, Any]:
    """OpenAI's job object; `lemix` holds what it has no place for."""
    values = job.hyperparameters
    openai = {
        "n_epochs": values.num_epochs,
        "batch_size": values.batch_size,
        "learning_rate_multiplier": values.learning_rate / BASE_LEARNING_RATE,
    }
    ended = job.finished_unix_s if job.HasField("finished_unix_s") else None
    error = LemixError.from_proto(job.error) if job.HasField("error") else None
    return {
        "id": job.job_id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_unix_s),
        "finished_at": None if ended is None else int(ended),
        "model": job.model,
        "fine_tuned_model": _fine_tuned_model(job),
        "organization_id": "",
        "status": _JOB_STATUS.get(job.status, "queued"),
        "training_file": job.training_file,
        "validation_file": job.validation_file or None,
        "result_files": [],
        "seed": 0,
        "trained_tokens": job.trained_tokens if ended is not None else None,
        "error": None if error is None else {"code": error.code.value, "message": error.message, "param": error.param},
        "hyperparameters": openai,
        "method": {"type": "supervised", "supervised": {"hyperparameters": openai}},
        "lemix": _job_extension(job),
    }


def _fine_tuned_model(job: types_pb2.TrainingJob) -> str | None:
    if job.status != types_pb2.JOB_STATUS_SUCCEEDED:
        return None
    # Online training changes the served model itself.
    return (job.served_model or None) if job.mode == types_pb2.TRAINING_MODE_ISOLATED else job.model


def _lora(job: types_pb2.TrainingJob) -> dict[str, Any] | None:
    if not job.HasField("lora"):
        return None
    lora = job.lora
    return {
        "rank": lora.rank,
        "alpha": lora.alpha,
        "dropout": lora.dropout,
        "target_modules": list(lora.target_modules),
    }


def _job_extension(job: types_pb2.TrainingJob) -> dict[str, Any]:
    values = job.hyperparameters
    return {
        "kind": _MODES[job.mode],
        "method": _METHODS[job.method],
        "lora": _lora(job),
        "served_model": job.served_model or None,
        "num_examples": job.num_examples,
        "total_microbatches": job.total_microbatches,
        "trained_microbatches": job.trained_microbatches,
        "unsaved_microbatches": job.unsaved_microbatches,
        "trained_tokens": job.trained_tokens,
        "last_loss": job.last_loss if job.HasField("last_loss") else None,
        "heldout_loss": _finite(job.heldout_loss) if job.HasField("heldout_loss") else None,
        "best_heldout_loss": job.best_heldout_loss if job.HasField("best_heldout_loss") else None,
        "best_checkpoint_id": job.best_checkpoint_id or None,
        "steps_per_node": dict(sorted(job.steps_per_node.items())),
        "learning_rate": values.learning_rate,
        "gradient_accumulation_steps": values.gradient_accumulation_steps,
        "lr_schedule": values.lr_schedule,
        "warmup_steps": values.warmup_steps,
        "weight_decay": values.weight_decay,
        "max_grad_norm": values.max_grad_norm,
        "max_skipped_in_row": values.max_skipped_in_row,
        "skipped_microbatches": job.skipped_microbatches,
    }


def checkpoint_object(checkpoint: types_pb2.Checkpoint) -> dict[str, Any]:
    """A checkpoint; its id is the weights version it holds."""
    return {
        "id": checkpoint.checkpoint_id,
        "object": "checkpoint",
        "created_at": int(checkpoint.created_unix_s),
        "node_id": checkpoint.node_id,
        "bytes": checkpoint.size_bytes,
        "reason": checkpoint.reason,
        "trained_microbatches": dict(sorted(checkpoint.trained_microbatches.items())),
        "heldout_loss": _finite(checkpoint.heldout_loss) if checkpoint.HasField("heldout_loss") else None,
    }


def version_object(version: types_pb2.WeightVersion) -> dict[str, Any]:
    """What a node serves from now on."""
    return {"node_id": version.node_id, "incarnation": version.incarnation, "step": version.step}


def _finite(loss: float) -> float | None:
    """JSON has no infinity: a model that has diverged has no loss there."""
    return loss if math.isfinite(loss) else None


def event_object(job_id: str, event: types_pb2.JobEvent) -> dict[str, Any]:
    """OpenAI's job event."""
    loss = event.loss if event.HasField("loss") else None
    data = {"sequence": event.sequence, "trained_microbatches": event.trained_microbatches}
    return {
        "id": f"{job_id}-{event.sequence}",
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_unix_s),
        "level": event.level,
        "message": event.message,
        "type": "message" if loss is None else "metrics",
        "data": data if loss is None else {**data, "train_loss": loss},
    }


def feedback_example(body: FeedbackBody, examples: ExampleBuilder) -> work_pb2.TrainingExample:
    """Raises INVALID_REQUEST, UNSUPPORTED, CONTEXT_LENGTH_EXCEEDED."""
    body.check_extra()
    given = {name for name in ("text", "prompt", "completion", "messages") if getattr(body, name) is not None}
    if given == {"text"}:
        return examples.from_text(body.text or "")
    if given == {"prompt", "completion"}:
        return examples.from_pair(body.prompt or "", body.completion or "")
    if given == {"messages"}:
        return examples.from_messages(turns(body.messages or []))
    raise invalid('needs either "text", or "prompt" and "completion", or "messages"')
