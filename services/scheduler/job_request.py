"""A new job as its owner asked for it, defaults filled in."""

import uuid

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import work_pb2
from lemix.v1 import training_service_pb2, types_pb2
from services.scheduler.adapters import model_of
from services.scheduler.hyperparameters import resolve, resolve_checkpoints, resolve_gate, resolve_method


def new_job(
    request: training_service_pb2.CreateJobRequest, file: work_pb2.FileRecord, *, created_unix_s: float
) -> types_pb2.TrainingJob:
    """A queued job with a new id over this file. Raises INVALID_REQUEST."""
    hyperparameters = resolve(request.hyperparameters)
    policy = resolve_checkpoints(request.checkpoint)
    gate = resolve_gate(request.quality_gate)
    method, mode, lora = resolve_method(request)
    if not file.num_examples:
        raise LemixError(ErrorCode.INVALID_REQUEST, "the file has no examples", param="training_file")
    batches_per_epoch = -(-file.num_examples // hyperparameters.batch_size)
    job_id = f"job-{uuid.uuid4().hex[:16]}"
    is_isolated = mode == types_pb2.TRAINING_MODE_ISOLATED
    return types_pb2.TrainingJob(
        job_id=job_id,
        model=request.model,
        training_file=file.file_id,
        status=types_pb2.JOB_STATUS_QUEUED,
        created_unix_s=created_unix_s,
        hyperparameters=hyperparameters,
        total_microbatches=batches_per_epoch * hyperparameters.num_epochs,
        num_examples=file.num_examples,
        checkpoint=policy,
        validation_file=request.validation_file,
        quality_gate=gate,
        method=method,
        mode=mode,
        lora=lora,
        served_model=model_of(request.model, job_id) if is_isolated else "",
    )
