"""A LeMix in memory, for the tests of applications: no server, no network, no waiting.

fake = FakeLemix(replies=["Hello!"])
client = fake.client()
assert client.generate("Hi").text == "Hello!"
assert fake.prompts == ["Hi"]
"""

import json
from collections.abc import AsyncGenerator, Generator, Iterable
from typing import Any

from lemix import aio
from lemix._calls import Call
from lemix.client import Client
from lemix.errors import ErrorCode, LemixError
from lemix.v1 import cluster_service_pb2 as cluster_pb
from lemix.v1 import inference_service_pb2 as inference_pb
from lemix.v1 import training_service_pb2 as training_pb
from lemix.v1 import types_pb2

__all__ = ["FakeLemix"]

_NOW_UNIX_S = 1_700_000_000.0


class FakeLemix:
    """Answers every call of the clients it makes. Jobs succeed at once; replies come in order, the last one repeats.

    fail_next(error) makes the next call fail. `prompts`, `feedback` and `calls` tell what was asked.
    """

    def __init__(self, replies: Iterable[str] = ("ok",), *, model: str = "fake") -> None:
        """replies: at least one."""
        self._replies = list(replies)
        if not self._replies:
            raise ValueError("FakeLemix needs at least one reply")
        self._model = model
        self._failures: list[LemixError] = []
        self._files: dict[str, int] = {}
        self._jobs: dict[str, types_pb2.TrainingJob] = {}
        self.calls: list[str] = []
        self.prompts: list[str | list[int] | list[tuple[str, str]]] = []
        self.feedback: list[training_pb.SubmitFeedbackRequest] = []

    def client(self) -> Client:
        """A blocking client of this fake."""
        return Client(transport=_FakeTransport(self), sleep=lambda _: None)

    def aio_client(self) -> aio.Client:
        """An asyncio client of this fake."""
        return aio.Client(transport=_FakeAioTransport(self), sleep=_no_sleep)

    def fail_next(self, *errors: LemixError) -> None:
        """Let the next calls fail, one error each."""
        self._failures.extend(errors)

    def answer(self, call: Call[Any]) -> list[Any]:
        """The response messages of one call. Raises the LemixError that is due."""
        name = call.method.rsplit("/", 1)[-1]
        self.calls.append(name)
        if self._failures:
            raise self._failures.pop(0)
        found: list[Any] = getattr(self, f"_{name}")(call.request)
        return found

    def _replies_to(self, spec: inference_pb.GenerationSpec) -> list[str]:
        """One per output wanted."""
        if spec.model not in ("", *self._models()):
            raise LemixError(ErrorCode.MODEL_NOT_FOUND, f"model {spec.model!r} is not served", param="model")
        form = spec.WhichOneof("prompt")
        if form == "text":
            self.prompts.append(spec.text)
        elif form == "tokens":
            self.prompts.append(list(spec.tokens.token_ids))
        else:
            self.prompts.append([(turn.role, turn.content) for turn in spec.chat.messages])
        wanted = range(spec.sampling.n or 1)
        return [self._replies.pop(0) if len(self._replies) > 1 else self._replies[0] for _ in wanted]

    def _Generate(self, request: inference_pb.GenerateRequest) -> list[Any]:  # noqa: N802
        texts = self._replies_to(request.spec)
        others = [
            inference_pb.Choice(text=text, finish_reason=types_pb2.FINISH_REASON_STOP, report=_report())
            for text in texts[1:]
        ]
        return [
            inference_pb.GenerateResponse(
                request_id=request.spec.request_id,
                model=request.spec.model or self._model,
                text=texts[0],
                finish_reason=types_pb2.FINISH_REASON_STOP,
                usage=_usage(texts),
                report=_report(),
                more_choices=others,
            )
        ]

    def _GenerateStream(self, request: inference_pb.GenerateStreamRequest) -> list[Any]:  # noqa: N802
        texts = self._replies_to(request.spec)
        pieces = []
        for choice_index, text in enumerate(texts):
            for index, word in enumerate(text.split(" ")):
                delta = word if index == 0 else f" {word}"
                pieces.append(self._piece(request.spec, choice_index, text_delta=delta))
            ending = {"finish_reason": types_pb2.FINISH_REASON_STOP, "report": _report()}
            pieces.append(self._piece(request.spec, choice_index, **ending))
        pieces[-1].usage.CopyFrom(_usage(texts))
        return pieces

    def _piece(
        self, spec: inference_pb.GenerationSpec, choice_index: int, **fields: Any
    ) -> inference_pb.GenerateStreamResponse:
        return inference_pb.GenerateStreamResponse(
            request_id=spec.request_id, model=spec.model or self._model, choice_index=choice_index, **fields
        )

    def _CreateFile(self, request: training_pb.CreateFileRequest) -> list[Any]:  # noqa: N802
        lines = [line for line in request.content.splitlines() if line.strip()]
        for number, line in enumerate(lines, start=1):
            try:
                json.loads(line)
            except ValueError as error:
                raise LemixError(ErrorCode.INVALID_TRAINING_FILE, f"line {number}: not JSON", param="file") from error
        file_id = f"file-{len(self._files) + 1}"
        self._files[file_id] = len(lines)
        return [
            training_pb.CreateFileResponse(
                file_id=file_id, size_bytes=len(request.content), num_examples=len(lines), created_unix_s=_NOW_UNIX_S
            )
        ]

    def _CreateJob(self, request: training_pb.CreateJobRequest) -> list[Any]:  # noqa: N802
        if request.training_file not in self._files:
            raise LemixError(ErrorCode.NOT_FOUND, "there is no such file", param="training_file")
        num_examples = self._files[request.training_file]
        job = types_pb2.TrainingJob(
            job_id=f"job-{len(self._jobs) + 1}",
            model=self._model,
            training_file=request.training_file,
            status=types_pb2.JOB_STATUS_SUCCEEDED,
            created_unix_s=_NOW_UNIX_S,
            finished_unix_s=_NOW_UNIX_S,
            hyperparameters=request.hyperparameters,
            total_microbatches=num_examples,
            trained_microbatches=num_examples,
            num_examples=num_examples,
            last_loss=1.0,
            method=types_pb2.TRAINING_METHOD_FULL,
            mode=request.mode,
        )
        if request.HasField("lora"):
            job.method = types_pb2.TRAINING_METHOD_LORA
            job.lora.CopyFrom(request.lora)
            if job.mode == types_pb2.TRAINING_MODE_ISOLATED:
                job.served_model = f"{self._model}:{job.job_id}"
        self._jobs[job.job_id] = job
        return [training_pb.CreateJobResponse(job=job)]

    def _GetJob(self, request: training_pb.GetJobRequest) -> list[Any]:  # noqa: N802
        return [training_pb.GetJobResponse(job=self._job(request.job_id))]

    def _ListJobs(self, request: training_pb.ListJobsRequest) -> list[Any]:  # noqa: N802
        return [training_pb.ListJobsResponse(jobs=list(self._jobs.values())[::-1][: request.limit])]

    def _CancelJob(self, request: training_pb.CancelJobRequest) -> list[Any]:  # noqa: N802
        self._job(request.job_id)
        raise LemixError(ErrorCode.CONFLICT, "the job has ended")

    def _PauseJob(self, request: training_pb.PauseJobRequest) -> list[Any]:  # noqa: N802
        self._job(request.job_id)
        raise LemixError(ErrorCode.CONFLICT, "the job has ended")

    def _ResumeJob(self, request: training_pb.ResumeJobRequest) -> list[Any]:  # noqa: N802
        self._job(request.job_id)
        raise LemixError(ErrorCode.CONFLICT, "the job has succeeded")

    def _DeleteModel(self, request: training_pb.DeleteModelRequest) -> list[Any]:  # noqa: N802
        job = next((job for job in self._jobs.values() if job.served_model == request.model != ""), None)
        if job is None:
            raise LemixError(ErrorCode.MODEL_NOT_FOUND, f"model {request.model!r} is not served", param="model")
        job.served_model = ""
        return [training_pb.DeleteModelResponse()]

    def _models(self) -> list[str]:
        return [self._model, *(job.served_model for job in self._jobs.values() if job.served_model)]

    def _WatchJob(self, request: training_pb.WatchJobRequest) -> list[Any]:  # noqa: N802
        job = self._job(request.job_id)
        event = types_pb2.JobEvent(sequence=1, created_unix_s=_NOW_UNIX_S, level="info", message="done", loss=1.0)
        return [training_pb.WatchJobResponse(event=event, job=job)] if request.after_sequence < 1 else []

    def _SaveCheckpoint(self, request: training_pb.SaveCheckpointRequest) -> list[Any]:  # noqa: N802
        self._job(request.job_id)
        return [training_pb.SaveCheckpointResponse(checkpoints=self._checkpoints(request.job_id))]

    def _ListCheckpoints(self, request: training_pb.ListCheckpointsRequest) -> list[Any]:  # noqa: N802
        return [training_pb.ListCheckpointsResponse(checkpoints=self._checkpoints(request.job_id))]

    def _ExportCheckpoint(self, request: training_pb.ExportCheckpointRequest) -> list[Any]:  # noqa: N802
        self._check_checkpoint(request.checkpoint_id)
        return [training_pb.ExportCheckpointResponse(node_id="fake-node", path="/checkpoints/exports/fake-node-1-1")]

    def _RestoreCheckpoint(self, request: training_pb.RestoreCheckpointRequest) -> list[Any]:  # noqa: N802
        self._check_checkpoint(request.checkpoint_id)
        version = types_pb2.WeightVersion(node_id=request.node_id or "fake-node", incarnation=1, step=2)
        return [training_pb.RestoreCheckpointResponse(version=version)]

    def _PublishCheckpoint(self, request: training_pb.PublishCheckpointRequest) -> list[Any]:  # noqa: N802
        self._check_checkpoint(request.checkpoint_id)
        versions = [types_pb2.WeightVersion(node_id=node_id, incarnation=1, step=1) for node_id in request.node_ids]
        return [training_pb.PublishCheckpointResponse(versions=versions)]

    def _checkpoints(self, job_id: str) -> list[types_pb2.Checkpoint]:
        """One that holds every job."""
        trained = {job.job_id: job.trained_microbatches for job in self._jobs.values()}
        if not trained or (job_id and job_id not in trained):
            return []
        checkpoint = types_pb2.Checkpoint(
            checkpoint_id="fake-node:1:1",
            node_id="fake-node",
            created_unix_s=_NOW_UNIX_S,
            size_bytes=1,
            trained_microbatches=trained,
            reason="job_end",
        )
        return [checkpoint]

    def _check_checkpoint(self, checkpoint_id: str) -> None:
        if checkpoint_id not in {checkpoint.checkpoint_id for checkpoint in self._checkpoints("")}:
            raise LemixError(ErrorCode.NOT_FOUND, f"no checkpoint {checkpoint_id!r}", param="checkpoint_id")

    def _SubmitFeedback(self, request: training_pb.SubmitFeedbackRequest) -> list[Any]:  # noqa: N802
        self.feedback.append(request)
        return [training_pb.SubmitFeedbackResponse(job_id="feedback", sequence=len(self.feedback))]

    def _ListModels(self, _: cluster_pb.ListModelsRequest) -> list[Any]:  # noqa: N802
        parents = ["", *(self._model for _ in self._models()[1:])]
        models = [
            cluster_pb.Model(id=model, parent=parent, max_context_tokens=4096, created_unix_s=_NOW_UNIX_S)
            for model, parent in zip(self._models(), parents, strict=True)
        ]
        return [cluster_pb.ListModelsResponse(models=models)]

    def _GetStatus(self, _: cluster_pb.GetStatusRequest) -> list[Any]:  # noqa: N802
        node = cluster_pb.NodeStatus(node_id="fake-node", ready=True, num_stages=1, role="both")
        return [cluster_pb.GetStatusResponse(policy="fake", ready=True, nodes=[node])]

    def _job(self, job_id: str) -> types_pb2.TrainingJob:
        if job_id not in self._jobs:
            raise LemixError(ErrorCode.NOT_FOUND, f"there is no job {job_id!r}", param="job_id")
        return self._jobs[job_id]


class _FakeTransport:
    def __init__(self, fake: FakeLemix) -> None:
        self._fake = fake

    def unary(self, call: Call[Any], timeout_s: float) -> Any:
        return self._fake.answer(call)[0]

    def stream(self, call: Call[Any], timeout_s: float) -> Generator[Any]:
        yield from self._fake.answer(call)

    def close(self) -> None:
        pass


class _FakeAioTransport:
    def __init__(self, fake: FakeLemix) -> None:
        self._fake = fake

    async def unary(self, call: Call[Any], timeout_s: float) -> Any:
        return self._fake.answer(call)[0]

    async def stream(self, call: Call[Any], timeout_s: float) -> AsyncGenerator[Any]:
        for message in self._fake.answer(call):
            yield message

    async def close(self) -> None:
        pass


async def _no_sleep(_: float) -> None:
    return None


def _usage(texts: list[str]) -> types_pb2.Usage:
    return types_pb2.Usage(prompt_tokens=1, completion_tokens=sum(len(text.split(" ")) for text in texts))


def _report() -> types_pb2.ServingReport:
    version = types_pb2.WeightVersion(node_id="fake-node", incarnation=1, step=0)
    return types_pb2.ServingReport(node_id="fake-node", weight_versions=[version])
