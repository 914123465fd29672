"""Every operation of the client as a value: which RPC, which request, how to read the answer, may it be tried again.

The blocking and the asyncio client differ only in how they run these.
"""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, Unpack

from google.protobuf.message import Message as Protobuf

from lemix import _convert, types
from lemix.errors import ErrorCode, LemixError
from lemix.v1 import cluster_service_pb2 as cluster_pb
from lemix.v1 import inference_service_pb2 as inference_pb
from lemix.v1 import training_service_pb2 as training_pb

T = TypeVar("T")

_INFERENCE = "/lemix.v1.InferenceService/"
_TRAINING = "/lemix.v1.TrainingService/"
_CLUSTER = "/lemix.v1.ClusterService/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    """One operation. read: the public type of an answer (of each answer of a stream). idempotent: safe to repeat."""

    method: str
    request: Protobuf
    response: type[Any]
    read: Callable[[Any], T]
    idempotent: bool = True


def generate(spec: inference_pb.GenerationSpec) -> Call[types.Generation]:
    """InferenceService.Generate."""
    return Call(
        method=_INFERENCE + "Generate",
        request=inference_pb.GenerateRequest(spec=spec),
        response=inference_pb.GenerateResponse,
        read=_convert.generation,
    )


def generate_stream(spec: inference_pb.GenerationSpec) -> Call[types.GenerationChunk]:
    """InferenceService.GenerateStream."""
    return Call(
        method=_INFERENCE + "GenerateStream",
        request=inference_pb.GenerateStreamRequest(spec=spec),
        response=inference_pb.GenerateStreamResponse,
        read=_convert.generation_chunk,
    )


def spec(
    prompt: str | Sequence[int] | None, messages: _convert.Messages | None, **options: Unpack[types.GenerationOptions]
) -> inference_pb.GenerationSpec:
    """The request of one generation: `prompt` or `messages`. Without a request id it gets one, so a retry is safe.

    Raises TypeError for an unknown option, LemixError INVALID_REQUEST for an unusable value.
    """
    unknown = set(options) - set(types.GenerationOptions.__annotations__)
    if unknown:
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}")
    made = inference_pb.GenerationSpec(
        model=options.get("model", ""),
        sampling=_convert.sampling(options),
        slo=_convert.slo(options.get("slo")),
        session_id=options.get("session_id", ""),
        request_id=options.get("request_id", "") or uuid.uuid4().hex,
        reference=options.get("reference"),
        max_staleness_s=options.get("max_staleness_s"),
    )
    if messages is not None:
        made.chat.CopyFrom(_convert.chat_prompt(messages))
    else:
        _convert.set_prompt(made, prompt if prompt is not None else "")
    return made


def create_file(
    path_or_content: str | Path | bytes, filename: str, on_bad_line: str, on_long_line: str
) -> Call[types.TrainingFile]:
    """TrainingService.CreateFile; every call makes a new file, so it is never repeated. Raises LemixError NOT_FOUND."""
    content = path_or_content
    if not isinstance(content, bytes):
        path = Path(content)
        filename = filename or path.name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise LemixError(ErrorCode.NOT_FOUND, f"cannot read {path}: {error.strerror}", param="file") from error
    return Call(
        method=_TRAINING + "CreateFile",
        request=training_pb.CreateFileRequest(
            filename=filename or "training.jsonl", content=content, on_bad_line=on_bad_line, on_long_line=on_long_line
        ),
        response=training_pb.CreateFileResponse,
        read=_convert.training_file,
        idempotent=False,
    )


def create_job(
    training_file: str,
    model: str,
    hyperparameters: types.Hyperparameters | None,
    request_id: str,
    checkpoint: types.CheckpointPolicy | None = None,
    validation_file: str = "",
    quality_gate: types.QualityGate | None = None,
    lora: types.Lora | None = None,
    mode: types.TrainingMode = types.TrainingMode.ONLINE,
) -> Call[types.TrainingJob]:
    """TrainingService.CreateJob."""
    return Call(
        method=_TRAINING + "CreateJob",
        request=training_pb.CreateJobRequest(
            model=model,
            training_file=training_file,
            hyperparameters=_convert.hyperparameters(hyperparameters),
            request_id=request_id or uuid.uuid4().hex,
            checkpoint=_convert.checkpoint_policy(checkpoint),
            validation_file=validation_file,
            quality_gate=_convert.quality_gate(quality_gate),
            mode=_convert.mode(mode),
            lora=_convert.lora(lora),
        ),
        response=training_pb.CreateJobResponse,
        read=lambda message: _convert.job(message.job),
    )


def get_job(job_id: str) -> Call[types.TrainingJob]:
    """TrainingService.GetJob."""
    return Call(
        method=_TRAINING + "GetJob",
        request=training_pb.GetJobRequest(job_id=job_id),
        response=training_pb.GetJobResponse,
        read=lambda message: _convert.job(message.job),
    )


def list_jobs(limit: int) -> Call[list[types.TrainingJob]]:
    """TrainingService.ListJobs. Raises LemixError INVALID_REQUEST."""
    if not 1 <= limit <= 100:
        raise LemixError(ErrorCode.INVALID_REQUEST, "limit must be in [1, 100]", param="limit")
    return Call(
        method=_TRAINING + "ListJobs",
        request=training_pb.ListJobsRequest(limit=limit),
        response=training_pb.ListJobsResponse,
        read=lambda message: _convert.jobs(message.jobs),
    )


def cancel_job(job_id: str) -> Call[types.TrainingJob]:
    """TrainingService.CancelJob."""
    return Call(
        method=_TRAINING + "CancelJob",
        request=training_pb.CancelJobRequest(job_id=job_id),
        response=training_pb.CancelJobResponse,
        read=lambda message: _convert.job(message.job),
    )


def pause_job(job_id: str) -> Call[types.TrainingJob]:
    """TrainingService.PauseJob."""
    return Call(
        method=_TRAINING + "PauseJob",
        request=training_pb.PauseJobRequest(job_id=job_id),
        response=training_pb.PauseJobResponse,
        read=lambda message: _convert.job(message.job),
    )


def resume_job(job_id: str) -> Call[types.TrainingJob]:
    """TrainingService.ResumeJob."""
    return Call(
        method=_TRAINING + "ResumeJob",
        request=training_pb.ResumeJobRequest(job_id=job_id),
        response=training_pb.ResumeJobResponse,
        read=lambda message: _convert.job(message.job),
    )


def delete_model(model: str) -> Call[None]:
    """TrainingService.DeleteModel."""
    return Call(
        method=_TRAINING + "DeleteModel",
        request=training_pb.DeleteModelRequest(model=model),
        response=training_pb.DeleteModelResponse,
        read=lambda message: None,
    )


def watch_job(job_id: str, after_sequence: int) -> Call[types.JobEvent]:
    """TrainingService.WatchJob."""
    return Call(
        method=_TRAINING + "WatchJob",
        request=training_pb.WatchJobRequest(job_id=job_id, after_sequence=after_sequence),
        response=training_pb.WatchJobResponse,
        read=_convert.job_event,
    )


def save_checkpoint(job_id: str) -> Call[list[types.Checkpoint]]:
    """TrainingService.SaveCheckpoint."""
    return Call(
        method=_TRAINING + "SaveCheckpoint",
        request=training_pb.SaveCheckpointRequest(job_id=job_id),
        response=training_pb.SaveCheckpointResponse,
        read=lambda message: _convert.checkpoints(message.checkpoints),
    )


def list_checkpoints(job_id: str) -> Call[list[types.Checkpoint]]:
    """TrainingService.ListCheckpoints."""
    return Call(
        method=_TRAINING + "ListCheckpoints",
        request=training_pb.ListCheckpointsRequest(job_id=job_id),
        response=training_pb.ListCheckpointsResponse,
        read=lambda message: _convert.checkpoints(message.checkpoints),
    )


def export_checkpoint(checkpoint_id: str, job_id: str) -> Call[types.ExportedCheckpoint]:
    """TrainingService.ExportCheckpoint."""
    return Call(
        method=_TRAINING + "ExportCheckpoint",
        request=training_pb.ExportCheckpointRequest(checkpoint_id=checkpoint_id, job_id=job_id),
        response=training_pb.ExportCheckpointResponse,
        read=_convert.exported,
    )


def restore_checkpoint(checkpoint_id: str, node_id: str) -> Call[types.WeightVersion]:
    """TrainingService.RestoreCheckpoint; repeated, it would undo what was trained in between."""
    return Call(
        method=_TRAINING + "RestoreCheckpoint",
        request=training_pb.RestoreCheckpointRequest(checkpoint_id=checkpoint_id, node_id=node_id),
        response=training_pb.RestoreCheckpointResponse,
        read=lambda message: _convert.weight_version(message.version),
        idempotent=False,
    )


def publish_checkpoint(checkpoint_id: str, node_ids: Sequence[str], force: bool) -> Call[list[types.WeightVersion]]:
    """TrainingService.PublishCheckpoint; repeated, it would undo what the others trained in between."""
    return Call(
        method=_TRAINING + "PublishCheckpoint",
        request=training_pb.PublishCheckpointRequest(checkpoint_id=checkpoint_id, node_ids=node_ids, force=force),
        response=training_pb.PublishCheckpointResponse,
        read=lambda message: [_convert.weight_version(version) for version in message.versions],
        idempotent=False,
    )


def feedback(
    text: str | None,
    prompt: str | None,
    completion: str | None,
    messages: _convert.Messages | None,
    *,
    model: str,
    request_id: str,
) -> Call[types.FeedbackReceipt]:
    """TrainingService.SubmitFeedback. Raises LemixError INVALID_REQUEST unless exactly one form is given."""
    request = training_pb.SubmitFeedbackRequest(model=model, request_id=request_id or uuid.uuid4().hex)
    given = (text is not None, prompt is not None or completion is not None, messages is not None)
    if sum(given) != 1:
        raise LemixError(ErrorCode.INVALID_REQUEST, "give text, or prompt and completion, or messages", param="example")
    if text is not None:
        request.text = text
    elif messages is not None:
        request.chat.CopyFrom(_convert.chat_prompt(messages))
    else:
        request.pair.CopyFrom(training_pb.PromptCompletion(prompt=prompt or "", completion=completion or ""))
    return Call(
        method=_TRAINING + "SubmitFeedback",
        request=request,
        response=training_pb.SubmitFeedbackResponse,
        read=_convert.receipt,
    )


def list_models() -> Call[list[types.Model]]:
    """ClusterService.ListModels."""
    return Call(
        method=_CLUSTER + "ListModels",
        request=cluster_pb.ListModelsRequest(),
        response=cluster_pb.ListModelsResponse,
        read=_convert.models,
    )


def get_status() -> Call[types.ClusterStatus]:
    """ClusterService.GetStatus."""
    return Call(
        method=_CLUSTER + "GetStatus",
        request=cluster_pb.GetStatusRequest(),
        response=cluster_pb.GetStatusResponse,
        read=_convert.cluster_status,
    )
