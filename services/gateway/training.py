"""Training: files, jobs and feedback, whoever asks."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager

import grpc.aio

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.internal.v1 import scheduler_service_pb2_grpc as pb_grpc
from lemix.internal.v1 import work_pb2
from lemix.v1 import training_service_pb2, types_pb2
from services.gateway import metrics
from services.gateway.config import Limits
from services.gateway.prompts import PromptBuilder
from services.gateway.scheduler_calls import call, follow
from services.gateway.training_examples import ExampleBuilder, parse_file
from services.gateway.validation import check_hyperparameters, check_id, check_training, invalid
from services.runtime.clock import Clock

#: Tokens per message of an upload: about 300 kB.
_BATCH_TOKENS = 65_536
_RETRY_AFTER_S = 2.0
#: Longest watch; clients go on from the last sequence they saw.
MAX_WATCH_S = 3600.0
_MAX_LISTED_EVENTS = 1000
_MAX_FILENAME_CHARS = 255


class TrainingService:
    """Everything about learning that a client can ask for."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        prompts: PromptBuilder,
        examples: ExampleBuilder,
        clock: Clock,
        limits: Limits,
        *,
        call_timeout_s: float,
        upload_timeout_s: float,
    ) -> None:
        self._stub = pb_grpc.SchedulerServiceStub(channel)
        self._prompts = prompts
        self.examples = examples
        self._clock = clock
        self._limits = limits
        self._timeout_s = call_timeout_s
        self._upload_timeout_s = upload_timeout_s
        self._num_uploads = 0
        self._num_watches = 0

    @asynccontextmanager
    async def upload_slot(self) -> AsyncGenerator[None]:
        """Hold one of the places for uploads, from before the file is read. Raises OVERLOADED without one."""
        if self._num_uploads >= self._limits.max_concurrent_uploads:
            raise _overloaded(f"{self._limits.max_concurrent_uploads} files are being uploaded already")
        self._num_uploads += 1
        try:
            yield
        finally:
            self._num_uploads -= 1

    async def create_file(
        self, filename: str, content: bytes, *, on_bad_line: str = "", on_long_line: str = ""
    ) -> work_pb2.FileRecord:
        """Tokenise and store a JSONL file. Call inside `upload_slot`. on_bad_line, on_long_line: see CreateFileRequest.

        Raises INVALID_REQUEST, INVALID_TRAINING_FILE naming the line, OVERLOADED when too large, UNAVAILABLE.
        """
        if len(content) > self._limits.max_file_bytes:
            raise LemixError(
                ErrorCode.OVERLOADED,
                f"the file has {len(content)} bytes; at most {self._limits.max_file_bytes} are taken",
            )
        if len(filename) > _MAX_FILENAME_CHARS:
            raise invalid(f"the file name is longer than {_MAX_FILENAME_CHARS} characters", "filename")
        for name, value, other in (("on_bad_line", on_bad_line, "skip"), ("on_long_line", on_long_line, "truncate")):
            if value not in ("", "reject", other):
                raise invalid(f"{name} must be 'reject' or '{other}', not {value[:50]!r}", name)
        parsed = await asyncio.to_thread(
            parse_file,
            content,
            self.examples,
            self._limits.max_file_examples,
            skip_bad=on_bad_line == "skip",
            truncate=on_long_line == "truncate",
        )
        examples = parsed.examples
        header = work_pb2.FileRecord(
            filename=filename or "training.jsonl",
            size_bytes=len(content),
            num_examples=len(examples),
            created_unix_s=self._clock.unix_s(),
            max_tokens=max(len(example.token_ids) for example in examples),
            num_skipped=parsed.num_skipped,
            num_truncated=parsed.num_truncated,
        )
        response = await call(self._stub.StoreFile, _upload(header, examples), self._upload_timeout_s)
        metrics.TRAINING_EXAMPLES.labels("file").inc(len(examples))
        return response.file

    async def get_file(self, file_id: str) -> work_pb2.FileRecord:
        """Raises NOT_FOUND."""
        check_required_id(file_id, "file_id")
        return (await call(self._stub.GetFile, pb.GetFileRequest(file_id=file_id), self._timeout_s)).file

    async def create_job(self, request: training_service_pb2.CreateJobRequest) -> types_pb2.TrainingJob:
        """Raises NOT_FOUND (file), MODEL_NOT_FOUND, INVALID_REQUEST, OVERLOADED."""
        self._prompts.check_model(request.model)
        check_required_id(request.training_file, "training_file")
        check_id(request.validation_file, "validation_file")
        check_id(request.request_id, "request_id")
        check_hyperparameters(request.hyperparameters)
        check_training(request)
        checked = training_service_pb2.CreateJobRequest()
        checked.CopyFrom(request)
        checked.model = self._prompts.model
        return (await call(self._stub.CreateJob, pb.CreateJobRequest(request=checked), self._timeout_s)).job

    async def get_job(self, job_id: str) -> types_pb2.TrainingJob:
        """Raises NOT_FOUND."""
        check_required_id(job_id, "job_id")
        return (await call(self._stub.GetJob, pb.GetJobRequest(job_id=job_id), self._timeout_s)).job

    async def list_jobs(self, limit: int) -> list[types_pb2.TrainingJob]:
        """Newest first; limit 1 to 100."""
        if not 1 <= limit <= 100:
            raise invalid("limit must be in [1, 100]", "limit")
        return list((await call(self._stub.ListJobs, pb.ListJobsRequest(limit=limit), self._timeout_s)).jobs)

    async def cancel_job(self, job_id: str) -> types_pb2.TrainingJob:
        """Raises NOT_FOUND, CONFLICT."""
        check_required_id(job_id, "job_id")
        return (await call(self._stub.CancelJob, pb.CancelJobRequest(job_id=job_id), self._timeout_s)).job

    async def pause_job(self, job_id: str) -> types_pb2.TrainingJob:
        """Raises NOT_FOUND, CONFLICT, OVERLOADED."""
        check_required_id(job_id, "job_id")
        return (await call(self._stub.PauseJob, pb.PauseJobRequest(job_id=job_id), self._timeout_s)).job

    async def resume_job(self, job_id: str) -> types_pb2.TrainingJob:
        """Raises NOT_FOUND, CONFLICT, OVERLOADED."""
        check_required_id(job_id, "job_id")
        return (await call(self._stub.ResumeJob, pb.ResumeJobRequest(job_id=job_id), self._timeout_s)).job

    async def delete_model(self, model: str) -> None:
        """Raises MODEL_NOT_FOUND, CONFLICT (it still trains, or is the served model itself)."""
        if model in ("", self._prompts.model):
            raise LemixError(ErrorCode.CONFLICT, f"{self._prompts.model} itself cannot be deleted", param="model")
        self._prompts.adapter_of(model)
        await call(self._stub.DeleteModel, pb.DeleteModelRequest(model=model), self._timeout_s)

    async def watch_job(
        self, job_id: str, after_sequence: int, timeout_s: float = MAX_WATCH_S, *, existing_only: bool = False
    ) -> AsyncGenerator[pb.WatchJobResponse]:
        """Events with a larger sequence, until the job ends or the deadline (DEADLINE_EXCEEDED).

        existing_only: only those there are now. Raises NOT_FOUND, OVERLOADED.
        """
        check_required_id(job_id, "job_id")
        if self._num_watches >= self._limits.max_concurrent_watches:
            raise _overloaded(f"{self._limits.max_concurrent_watches} jobs are being watched already")
        self._num_watches += 1
        try:
            request = pb.WatchJobRequest(job_id=job_id, after_sequence=after_sequence, existing_only=existing_only)
            async with aclosing(follow(self._stub.WatchJob, request, timeout_s)) as messages:
                async for message in messages:
                    yield message
        finally:
            self._num_watches -= 1

    async def list_events(self, job_id: str, before_sequence: int, limit: int) -> tuple[list[types_pb2.JobEvent], bool]:
        """Events so far, newest first, at most `limit` (1 to 1000), and whether there are older ones.

        before_sequence: only events with a smaller one; 0: all.
        """
        if not 1 <= limit <= _MAX_LISTED_EVENTS:
            raise invalid(f"limit must be in [1, {_MAX_LISTED_EVENTS}]", "limit")
        newest: deque[types_pb2.JobEvent] = deque(maxlen=limit + 1)
        async with aclosing(self.watch_job(job_id, 0, self._timeout_s, existing_only=True)) as messages:
            async for message in messages:
                if before_sequence and message.event.sequence >= before_sequence:
                    break
                newest.append(message.event)
        return list(reversed(newest))[:limit], len(newest) > limit

    async def save_checkpoint(self, job_id: str) -> list[types_pb2.Checkpoint]:
        """Raises NOT_FOUND, CONFLICT, RESOURCE_EXHAUSTED, NODE_LOST, DEADLINE_EXCEEDED."""
        check_required_id(job_id, "job_id")
        request = pb.SaveCheckpointRequest(job_id=job_id)
        return list((await call(self._stub.SaveCheckpoint, request, self._upload_timeout_s)).checkpoints)

    async def list_checkpoints(self, job_id: str = "") -> list[types_pb2.Checkpoint]:
        """The newest first; of one job if it is named."""
        check_id(job_id, "job_id")
        request = pb.ListCheckpointsRequest(job_id=job_id)
        return list((await call(self._stub.ListCheckpoints, request, self._timeout_s)).checkpoints)

    async def export_checkpoint(self, checkpoint_id: str, job_id: str = "") -> pb.ExportCheckpointResponse:
        """Raises NOT_FOUND, CONFLICT, RESOURCE_EXHAUSTED, NODE_LOST, DEADLINE_EXCEEDED."""
        check_required_id(checkpoint_id, "checkpoint_id")
        check_id(job_id, "job_id")
        request = pb.ExportCheckpointRequest(checkpoint_id=checkpoint_id, job_id=job_id)
        return await call(self._stub.ExportCheckpoint, request, self._upload_timeout_s)

    async def restore_checkpoint(self, checkpoint_id: str, node_id: str) -> types_pb2.WeightVersion:
        """Raises NOT_FOUND, CONFLICT, UNAVAILABLE (the node is away), DEADLINE_EXCEEDED."""
        check_required_id(checkpoint_id, "checkpoint_id")
        check_id(node_id, "node_id")
        request = pb.RestoreCheckpointRequest(checkpoint_id=checkpoint_id, node_id=node_id)
        return (await call(self._stub.RestoreCheckpoint, request, self._upload_timeout_s)).version

    async def publish_checkpoint(
        self, request: training_service_pb2.PublishCheckpointRequest
    ) -> list[types_pb2.WeightVersion]:
        """Raises NOT_FOUND, CONFLICT, UNAVAILABLE (a node is away), DEADLINE_EXCEEDED."""
        check_required_id(request.checkpoint_id, "checkpoint_id")
        for node_id in request.node_ids:
            check_required_id(node_id, "node_ids")
        asked = pb.PublishCheckpointRequest(
            checkpoint_id=request.checkpoint_id, node_ids=request.node_ids, force=request.force
        )
        return list((await call(self._stub.PublishCheckpoint, asked, self._upload_timeout_s)).versions)

    async def submit_feedback(
        self, model: str, example: work_pb2.TrainingExample, request_id: str
    ) -> pb.SubmitFeedbackResponse:
        """Hand one example over. Raises MODEL_NOT_FOUND, INVALID_REQUEST, OVERLOADED."""
        self._prompts.check_model(model)
        check_id(request_id, "request_id")
        request = pb.SubmitFeedbackRequest(example=example, request_id=request_id, model=self._prompts.model)
        response = await call(self._stub.SubmitFeedback, request, self._timeout_s)
        metrics.TRAINING_EXAMPLES.labels("feedback").inc()
        return response


def check_required_id(value: str, param: str) -> None:
    """Raises INVALID_REQUEST unless it is a well-formed, non-empty id."""
    if not value:
        raise invalid(f"{param} is missing", param)
    check_id(value, param)


def _upload(header: work_pb2.FileRecord, examples: Sequence[work_pb2.TrainingExample]) -> Iterator[pb.StoreFileRequest]:
    yield pb.StoreFileRequest(file=header)
    batch: list[work_pb2.TrainingExample] = []
    num_tokens = 0
    for example in examples:
        batch.append(example)
        num_tokens += len(example.token_ids)
        if num_tokens >= _BATCH_TOKENS:
            yield pb.StoreFileRequest(examples=batch)
            batch, num_tokens = [], 0
    if batch:
        yield pb.StoreFileRequest(examples=batch)


def _overloaded(message: str) -> LemixError:
    return LemixError(ErrorCode.OVERLOADED, message, retry_after_s=_RETRY_AFTER_S)
