"""A scheduler and a node that speak the real protocols over loopback gRPC and say what a test tells them to."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import node_agent_service_pb2 as node_pb
from lemix.internal.v1 import node_agent_service_pb2_grpc as node_grpc
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.internal.v1 import scheduler_service_pb2_grpc as pb_grpc
from lemix.internal.v1 import work_pb2
from lemix.v1 import cluster_service_pb2, types_pb2
from services.runtime.interceptors import ErrorInterceptor
from tests.unit.gateway.model_files import EOS, byte_tokenizer

_TOKENIZER = byte_tokenizer()


@dataclass
class Script:
    """What a node answers. Tokens beyond `hold_after` wait until `go` is set."""

    text: str = "hello world"
    end: bool = True
    hold_after: int | None = None
    error: LemixError | None = None
    go: asyncio.Event = field(default_factory=asyncio.Event)

    def tokens(self, max_tokens: int) -> list[int]:
        return [*_TOKENIZER.encode(self.text).ids, *([EOS] if self.end else [])][:max_tokens]


class FakeNode(node_grpc.NodeAgentServiceServicer):
    """Produces scripted tokens for the requests it was given."""

    def __init__(self, node_id: str) -> None:
        self.node_id = node_id
        self.address = ""
        self.attached: list[tuple[str, int]] = []
        self.server: grpc.aio.Server | None = None
        self._runs: dict[str, _Run] = {}

    async def start(self, address: str = "127.0.0.1:0") -> None:
        self.server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        node_grpc.add_NodeAgentServiceServicer_to_server(self, self.server)
        port = self.server.add_insecure_port(address)
        self.address = f"127.0.0.1:{port}"
        await self.server.start()

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(None)

    def begin(self, request_id: str, work: work_pb2.InferenceWork, script: Script) -> None:
        self._run(request_id).begin(work, script)

    def cancel(self, request_id: str) -> None:
        self._run(request_id).cancel()

    def forget(self, request_id: str) -> None:
        """As if it had never been here."""
        del self._runs[request_id]

    def outcome(self, request_id: str) -> work_pb2.InferenceOutcome | None:
        run = self._run(request_id)
        return run.outcome(self.node_id) if run.done else None

    def _run(self, request_id: str) -> "_Run":
        return self._runs.setdefault(request_id, _Run())

    async def StreamTokens(  # noqa: N802
        self, request_iterator: AsyncIterator[node_pb.StreamTokensRequest], context: Any
    ) -> AsyncIterator[node_pb.StreamTokensResponse]:
        chunks: asyncio.Queue[node_pb.TokenChunk] = asyncio.Queue()
        tasks: list[asyncio.Task[None]] = []

        async def read() -> None:
            async for request in request_iterator:
                self.attached.append((request.request_id, request.offset))
                tasks.append(asyncio.create_task(self._send(request.request_id, request.offset, chunks)))

        tasks.append(asyncio.create_task(read()))
        try:
            while True:
                yield node_pb.StreamTokensResponse(chunks=[await chunks.get()])
        finally:
            for task in tasks:
                task.cancel()

    async def _send(self, request_id: str, offset: int, chunks: asyncio.Queue[node_pb.TokenChunk]) -> None:
        run = self._run(request_id)
        while not run.done or offset < len(run.produced):
            await run.changed(offset)
            if offset < len(run.produced):
                chunks.put_nowait(
                    node_pb.TokenChunk(
                        request_id=request_id,
                        offset=offset,
                        token_ids=[run.produced[offset]],
                        logprobs=run.logprobs(offset, offset + 1),
                    )
                )
                offset += 1
        chunks.put_nowait(node_pb.TokenChunk(request_id=request_id, offset=offset, outcome=run.outcome(self.node_id)))


class _Run:
    """One request on a node."""

    def __init__(self) -> None:
        self.produced: list[int] = []
        self.done = False
        self._reason = types_pb2.FINISH_REASON_UNSPECIFIED
        self._work = work_pb2.InferenceWork()
        self._script = Script()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def logprobs(self, begin: int, end: int) -> list[work_pb2.TokenLogprobs]:
        """-0.5 for the token itself, then the letter "a" and "b", if the request wants them."""
        sampling = self._work.sampling
        if not sampling.HasField("logprobs"):
            return []
        one = work_pb2.TokenLogprobs(
            logprob=-0.5,
            top_token_ids=b"abc"[: sampling.logprobs],
            top_logprobs=[-1.0, -2.0, -3.0][: sampling.logprobs],
        )
        return [one for _ in self.produced[begin:end]]

    def begin(self, work: work_pb2.InferenceWork, script: Script) -> None:
        self._work, self._script = work, script
        self._task = asyncio.create_task(self._produce())

    def cancel(self) -> None:
        if not self.done:
            self._end(types_pb2.FINISH_REASON_CANCELLED)

    async def changed(self, offset: int) -> None:
        while not self.done and offset >= len(self.produced):
            self._wake.clear()
            await self._wake.wait()

    async def _produce(self) -> None:
        tokens = self._script.tokens(self._work.sampling.max_tokens)
        for index, token in enumerate(tokens):
            if index == self._script.hold_after:
                await self._script.go.wait()
            if self.done:
                return
            self.produced.append(token)
            self._wake.set()
            await asyncio.sleep(0)
        if self._script.error is not None:
            self._end(types_pb2.FINISH_REASON_ERROR)
            return
        ended = bool(tokens) and tokens[-1] == EOS
        self._end(types_pb2.FINISH_REASON_STOP if ended else types_pb2.FINISH_REASON_LENGTH)

    def _end(self, reason: Any) -> None:
        self._reason, self.done = reason, True
        self._wake.set()

    def outcome(self, node_id: str) -> work_pb2.InferenceOutcome:
        version = types_pb2.WeightVersion(node_id=node_id, incarnation=1, step=235, job_id="job-7")
        report = types_pb2.ServingReport(node_id=node_id, weight_versions=[version], staleness_s=0.5)
        if self._work.reference_token_ids:
            report.reference_loss = 1.25
        outcome = work_pb2.InferenceOutcome(
            finish_reason=self._reason,
            token_ids=self.produced,
            logprobs=self.logprobs(0, len(self.produced)),
            prompt_tokens=len(self._work.prompt_token_ids),
            report=report,
        )
        if self._reason == types_pb2.FINISH_REASON_ERROR and self._script.error is not None:
            outcome.error.CopyFrom(self._script.error.to_proto())
        if self._reason == types_pb2.FINISH_REASON_CANCELLED:
            outcome.error.CopyFrom(LemixError(ErrorCode.CANCELLED, "cancelled").to_proto())
        return outcome


class FakeScheduler(pb_grpc.SchedulerServiceServicer):
    """Accepts everything, assigns to `node` unless told otherwise, keeps files and jobs in memory."""

    def __init__(self, node: FakeNode) -> None:
        self.node = node
        self.script = Script()
        self.hold = False
        self.reject: LemixError | None = None
        self.reject_ids: set[str] = set()  # refused as overloaded
        self.ready = True
        self.submitted: list[tuple[str, work_pb2.InferenceWork]] = []
        self.submits: asyncio.Queue[str] = asyncio.Queue()
        self.cancels: asyncio.Queue[str] = asyncio.Queue()
        self.deaf = False  # whether cancels are lost on their way
        self.lost_cancels: asyncio.Queue[str] = asyncio.Queue()
        self.num_sessions = 0
        self.files: dict[str, tuple[work_pb2.FileRecord, list[work_pb2.TrainingExample]]] = {}
        self.num_file_messages = 0
        self.jobs: dict[str, types_pb2.TrainingJob] = {}
        self.checkpoints: list[types_pb2.Checkpoint] = []
        self.job_requests: list[Any] = []
        self.feedback: list[pb.SubmitFeedbackRequest] = []
        self.endless: set[str] = set()  # jobs whose watch stays open after the events there are
        self.address = ""
        self._server: grpc.aio.Server | None = None
        self._outbox: asyncio.Queue[pb.GatewaySessionResponse | None] = asyncio.Queue()

    async def start(self, address: str = "127.0.0.1:0") -> None:
        self._server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=[("grpc.so_reuseport", 0)])
        pb_grpc.add_SchedulerServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(address)
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)

    def drop_session(self) -> None:
        """Break the gateway's session."""
        self._outbox.put_nowait(None)

    def assign(self, request_id: str, node: FakeNode) -> None:
        """Tell the gateway that a node has the request."""
        self._say(request_id, assigned=pb.InferenceAssigned(node_id=node.node_id, node_address=node.address))

    def finish(self, request_id: str, outcome: work_pb2.InferenceOutcome) -> None:
        """Tell the gateway how a request ended."""
        self._say(request_id, finished=outcome)

    async def GatewaySession(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.GatewaySessionRequest], context: Any
    ) -> AsyncIterator[pb.GatewaySessionResponse]:
        self.num_sessions += 1
        self._outbox = asyncio.Queue()
        reader = asyncio.create_task(self._read(request_iterator))
        try:
            while (message := await self._outbox.get()) is not None:
                yield message
            await context.abort(grpc.StatusCode.UNAVAILABLE, "session dropped by the test")
        finally:
            reader.cancel()

    async def _read(self, requests: AsyncIterator[pb.GatewaySessionRequest]) -> None:
        async for request in requests:
            kind = request.WhichOneof("message")
            if kind == "hello":
                self._say("", welcome=pb.GatewayWelcome())
            elif kind == "submit":
                self._submit(request.submit.request_id, request.submit.work)
            elif self.deaf:
                self.lost_cancels.put_nowait(request.cancel.request_id)
            else:
                self.cancels.put_nowait(request.cancel.request_id)
                self.node.cancel(request.cancel.request_id)

    def _submit(self, request_id: str, work: work_pb2.InferenceWork) -> None:
        known = any(request_id == seen for seen, _ in self.submitted)
        self.submitted.append((request_id, work))
        self.submits.put_nowait(request_id)
        reject = LemixError(ErrorCode.OVERLOADED, "full") if request_id in self.reject_ids else self.reject
        if reject is not None:
            self._say(request_id, rejected=reject.to_proto())
            return
        self._say(request_id, accepted=pb.InferenceAccepted())
        if known and (outcome := self.node.outcome(request_id)) is not None:
            self._say(request_id, finished=outcome)
        elif not self.hold:
            if not known:
                self.node.begin(request_id, work, self.script)
            self.assign(request_id, self.node)

    def _say(self, request_id: str, **message: Any) -> None:
        self._outbox.put_nowait(pb.GatewaySessionResponse(request_id=request_id, **message))

    async def StoreFile(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.StoreFileRequest], context: Any
    ) -> pb.StoreFileResponse:
        record, examples = work_pb2.FileRecord(), []
        async for request in request_iterator:
            self.num_file_messages += 1
            if request.HasField("file"):
                record.CopyFrom(request.file)
            examples.extend(request.examples)
        record.file_id = f"file-{len(self.files) + 1}"
        self.files[record.file_id] = (record, examples)
        return pb.StoreFileResponse(file=record)

    async def GetFile(self, request: pb.GetFileRequest, context: Any) -> pb.GetFileResponse:  # noqa: N802
        if request.file_id not in self.files:
            raise LemixError(ErrorCode.NOT_FOUND, f"there is no file {request.file_id}", param="file_id")
        return pb.GetFileResponse(file=self.files[request.file_id][0])

    async def CreateJob(self, request: pb.CreateJobRequest, context: Any) -> pb.CreateJobResponse:  # noqa: N802
        wanted = request.request
        if wanted.training_file not in self.files:
            raise LemixError(ErrorCode.NOT_FOUND, "there is no such file", param="training_file")
        self.job_requests.append(wanted)
        values = types_pb2.Hyperparameters(
            learning_rate=1e-4, num_epochs=1, batch_size=1, gradient_accumulation_steps=1, lr_schedule="constant",
            max_grad_norm=1.0,
        )  # fmt: skip
        values.MergeFrom(wanted.hyperparameters)
        job = types_pb2.TrainingJob(
            job_id=f"ftjob-{len(self.jobs) + 1}",
            model=wanted.model,
            training_file=wanted.training_file,
            status=types_pb2.JOB_STATUS_RUNNING,
            created_unix_s=1_700_000_000 + len(self.jobs),
            hyperparameters=values,
            total_microbatches=3,
            num_examples=len(self.files[wanted.training_file][1]),
        )
        self.jobs[job.job_id] = job
        return pb.CreateJobResponse(job=job)

    async def GetJob(self, request: pb.GetJobRequest, context: Any) -> pb.GetJobResponse:  # noqa: N802
        return pb.GetJobResponse(job=self._job(request.job_id))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Any) -> pb.ListJobsResponse:  # noqa: N802
        return pb.ListJobsResponse(jobs=list(self.jobs.values())[::-1][: request.limit])

    async def CancelJob(self, request: pb.CancelJobRequest, context: Any) -> pb.CancelJobResponse:  # noqa: N802
        job = self._job(request.job_id)
        if job.status == types_pb2.JOB_STATUS_SUCCEEDED:
            raise LemixError(ErrorCode.CONFLICT, "the job has ended")
        job.status = types_pb2.JOB_STATUS_CANCELLED
        job.finished_unix_s = 1_700_000_100
        return pb.CancelJobResponse(job=job)

    async def PauseJob(self, request: pb.PauseJobRequest, context: Any) -> pb.PauseJobResponse:  # noqa: N802
        job = self._job(request.job_id)
        job.status = types_pb2.JOB_STATUS_PAUSED
        return pb.PauseJobResponse(job=job)

    async def ResumeJob(self, request: pb.ResumeJobRequest, context: Any) -> pb.ResumeJobResponse:  # noqa: N802
        job = self._job(request.job_id)
        job.status = types_pb2.JOB_STATUS_RUNNING
        return pb.ResumeJobResponse(job=job)

    async def WatchJob(  # noqa: N802
        self, request: pb.WatchJobRequest, context: Any
    ) -> AsyncIterator[pb.WatchJobResponse]:
        job = self._job(request.job_id)
        for sequence in range(1, 4):
            if sequence > request.after_sequence:
                event = types_pb2.JobEvent(
                    sequence=sequence, created_unix_s=1_700_000_000 + sequence, level="info",
                    message=f"micro-batch {sequence}", loss=3.0 / sequence, trained_microbatches=sequence,
                )  # fmt: skip
                yield pb.WatchJobResponse(event=event, job=job)
        still_open = job.status == types_pb2.JOB_STATUS_RUNNING and job.job_id in self.endless
        if still_open and not request.existing_only:
            await asyncio.Event().wait()

    def _checkpoint(self, checkpoint_id: str) -> types_pb2.Checkpoint:
        for checkpoint in self.checkpoints:
            if checkpoint.checkpoint_id == checkpoint_id:
                return checkpoint
        raise LemixError(ErrorCode.NOT_FOUND, f"no checkpoint {checkpoint_id}", param="checkpoint_id")

    async def SaveCheckpoint(  # noqa: N802
        self, request: pb.SaveCheckpointRequest, context: Any
    ) -> pb.SaveCheckpointResponse:
        step = len(self.checkpoints) + 1
        checkpoint = types_pb2.Checkpoint(
            checkpoint_id=f"node-0:1:{step}",
            node_id="node-0",
            created_unix_s=1_700_000_000 + step,
            size_bytes=100,
            trained_microbatches={self._job(request.job_id).job_id: step},
            reason="request",
            heldout_loss=float("inf") if step == 2 else 2.5,
        )
        self.checkpoints.insert(0, checkpoint)
        return pb.SaveCheckpointResponse(checkpoints=[checkpoint])

    async def ListCheckpoints(  # noqa: N802
        self, request: pb.ListCheckpointsRequest, context: Any
    ) -> pb.ListCheckpointsResponse:
        found = [item for item in self.checkpoints if not request.job_id or request.job_id in item.trained_microbatches]
        return pb.ListCheckpointsResponse(checkpoints=found)

    async def ExportCheckpoint(  # noqa: N802
        self, request: pb.ExportCheckpointRequest, context: Any
    ) -> pb.ExportCheckpointResponse:
        return pb.ExportCheckpointResponse(node_id=self._checkpoint(request.checkpoint_id).node_id, path="/exports/x")

    async def RestoreCheckpoint(  # noqa: N802
        self, request: pb.RestoreCheckpointRequest, context: Any
    ) -> pb.RestoreCheckpointResponse:
        owner = self._checkpoint(request.checkpoint_id).node_id
        version = types_pb2.WeightVersion(node_id=request.node_id or owner, incarnation=1, step=9)
        return pb.RestoreCheckpointResponse(version=version)

    async def PublishCheckpoint(  # noqa: N802
        self, request: pb.PublishCheckpointRequest, context: Any
    ) -> pb.PublishCheckpointResponse:
        if self._checkpoint(request.checkpoint_id).heldout_loss == float("inf") and not request.force:
            raise LemixError(ErrorCode.CONFLICT, "its held-out loss is worse", param="checkpoint_id")
        versions = [types_pb2.WeightVersion(node_id=node_id, incarnation=1, step=4) for node_id in request.node_ids]
        return pb.PublishCheckpointResponse(versions=versions)

    async def SubmitFeedback(  # noqa: N802
        self, request: pb.SubmitFeedbackRequest, context: Any
    ) -> pb.SubmitFeedbackResponse:
        self.feedback.append(request)
        return pb.SubmitFeedbackResponse(job_id="feedback", sequence=len(self.feedback))

    async def GetClusterState(  # noqa: N802
        self, request: pb.GetClusterStateRequest, context: Any
    ) -> pb.GetClusterStateResponse:
        node = cluster_service_pb2.NodeStatus(
            node_id=self.node.node_id, ready=True, num_stages=2, weight_step=235, role="both"
        )
        status = cluster_service_pb2.GetStatusResponse(policy="lemix", ready=self.ready, nodes=[node])
        if not self.ready:
            status.not_ready_reason = "no node is ready"
        return pb.GetClusterStateResponse(status=status)

    def _job(self, job_id: str) -> types_pb2.TrainingJob:
        if job_id not in self.jobs:
            raise LemixError(ErrorCode.NOT_FOUND, f"there is no job {job_id}", param="job_id")
        return self.jobs[job_id]
