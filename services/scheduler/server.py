"""gRPC handlers of the scheduler."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc.aio
import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.internal.v1 import scheduler_service_pb2_grpc as pb_grpc
from lemix.internal.v1 import work_pb2
from services.runtime.clock import Clock
from services.scheduler.checkpoints import CheckpointDesk
from services.scheduler.convert import add_predictions, status_to_proto
from services.scheduler.driver_ports import Core
from services.scheduler.explain.accuracy import Accuracy
from services.scheduler.explain.convert import decision_to_proto, waits_to_proto
from services.scheduler.explain.decisions import Decisions
from services.scheduler.gateways import GatewayRegistry
from services.scheduler.guard import LedgerGuard
from services.scheduler.nodes import NodeRegistry
from services.scheduler.quality import QualityGate
from services.scheduler.training import Training

_log = structlog.get_logger()

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

#: Longest silence within an upload, seconds.
_UPLOAD_TIMEOUT_S = 30.0
#: Decisions listed when nothing is asked for, and at most: a decision takes about 100 bytes per candidate.
_LISTED_DECISIONS = 20
_MAX_LISTED_DECISIONS = 1000


class SchedulerServicer(pb_grpc.SchedulerServiceServicer):
    """Validates, converts, calls, converts."""

    def __init__(
        self,
        *,
        core: Core,
        nodes: NodeRegistry,
        gateways: GatewayRegistry,
        training: Training,
        checkpoints: CheckpointDesk,
        quality: QualityGate,
        guard: LedgerGuard,
        clock: Clock,
        decisions: Decisions,
        accuracy: Accuracy,
        max_file_examples: int,
    ) -> None:
        self._core = core
        self._nodes = nodes
        self._gateways = gateways
        self._training = training
        self._checkpoints = checkpoints
        self._quality = quality
        self._guard = guard
        self._clock = clock
        self._decisions = decisions
        self._accuracy = accuracy
        self._max_file_examples = max_file_examples

    async def GatewaySession(  # noqa: N802  the name of the RPC
        self, request_iterator: AsyncIterator[pb.GatewaySessionRequest], context: Context
    ) -> AsyncIterator[pb.GatewaySessionResponse]:
        """A gateway's stream."""
        async with aclosing(self._gateways.session(aiter(request_iterator))) as messages:
            async for message in messages:
                yield message

    async def NodeSession(  # noqa: N802  the name of the RPC
        self, request_iterator: AsyncIterator[pb.NodeSessionRequest], context: Context
    ) -> AsyncIterator[pb.NodeSessionResponse]:
        """A node's stream."""
        async with aclosing(self._nodes.session(aiter(request_iterator))) as messages:
            async for message in messages:
                yield message

    async def StoreFile(  # noqa: N802  the name of the RPC
        self, request_iterator: AsyncIterator[pb.StoreFileRequest], context: Context
    ) -> pb.StoreFileResponse:
        """Store the batches of a file under a new id."""
        requests = aiter(request_iterator)
        message = await _next_part(requests)
        if message is None or not message.HasField("file"):
            raise LemixError(ErrorCode.INVALID_REQUEST, "the first message carries the file's header", param="file")
        record = work_pb2.FileRecord()
        record.CopyFrom(message.file)
        record.file_id = f"file-{uuid.uuid4().hex[:16]}"
        record.created_unix_s = record.created_unix_s or self._clock.unix_s()
        num_announced, record.num_examples = record.num_examples, 0
        try:
            while message is not None:
                await self._store_part(record, list(message.examples))
                message = await _next_part(requests)
            if record.num_examples != num_announced:
                ended = f"the upload ended after {record.num_examples} of {num_announced} examples"
                raise LemixError(ErrorCode.INVALID_REQUEST, ended, param="file")
        except BaseException:
            # Nobody learns the id of a broken upload, so nobody could ever use what is stored of it.
            await asyncio.shield(self._discard(record.file_id))
            raise
        return pb.StoreFileResponse(file=record)

    async def _store_part(self, record: work_pb2.FileRecord, examples: list[work_pb2.TrainingExample]) -> None:
        record.num_examples += len(examples)
        if record.num_examples > self._max_file_examples:
            message = f"the file has more than {self._max_file_examples} examples"
            raise LemixError(ErrorCode.OVERLOADED, message, param="file")
        record.max_tokens = max([record.max_tokens, *(len(example.token_ids) for example in examples)])
        await self._guard.once(lambda: self._guard.ledger.put_file(record, examples))

    async def _discard(self, file_id: str) -> None:
        try:
            await self._guard.once(lambda: self._guard.ledger.delete_file(file_id))
        except LemixError as error:
            _log.warning("a broken upload stays until it expires", file=file_id, error=str(error))

    async def GetFile(self, request: pb.GetFileRequest, context: Context) -> pb.GetFileResponse:  # noqa: N802
        """A stored file."""
        return pb.GetFileResponse(file=await self._training.jobs.get_file(request.file_id, param="file_id"))

    async def CreateJob(self, request: pb.CreateJobRequest, context: Context) -> pb.CreateJobResponse:  # noqa: N802
        """A new job."""
        wanted, nodes = request.request, self._nodes
        job = await self._training.calls.create(wanted, nodes.models, nodes.projections(wanted.model))
        return pb.CreateJobResponse(job=job)

    async def GetJob(self, request: pb.GetJobRequest, context: Context) -> pb.GetJobResponse:  # noqa: N802
        """One job."""
        return pb.GetJobResponse(job=await self._training.calls.get(request.job_id))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:  # noqa: N802
        """The newest jobs."""
        return pb.ListJobsResponse(jobs=await self._training.jobs.newest(request.limit or 20))

    async def CancelJob(self, request: pb.CancelJobRequest, context: Context) -> pb.CancelJobResponse:  # noqa: N802
        """Stop a job."""
        return pb.CancelJobResponse(job=await self._training.calls.cancel(request.job_id))

    async def PauseJob(self, request: pb.PauseJobRequest, context: Context) -> pb.PauseJobResponse:  # noqa: N802
        """Hold a job."""
        return pb.PauseJobResponse(job=await self._training.pausing.pause(request.job_id))

    async def ResumeJob(self, request: pb.ResumeJobRequest, context: Context) -> pb.ResumeJobResponse:  # noqa: N802
        """Let a job go on."""
        return pb.ResumeJobResponse(job=await self._training.pausing.resume(request.job_id))

    async def DeleteModel(self, request: pb.DeleteModelRequest, context: Context) -> pb.DeleteModelResponse:  # noqa: N802
        """The model of an isolated job is no longer served."""
        await self._training.calls.delete_model(request.model)
        return pb.DeleteModelResponse()

    async def WatchJob(  # noqa: N802  the name of the RPC
        self, request: pb.WatchJobRequest, context: Context
    ) -> AsyncIterator[pb.WatchJobResponse]:
        """Follow a job."""
        watch = self._training.calls.watch(request.job_id, request.after_sequence, existing_only=request.existing_only)
        async with aclosing(watch) as events:
            async for event, job in events:
                yield pb.WatchJobResponse(event=event, job=job)

    async def SubmitFeedback(  # noqa: N802  the name of the RPC
        self, request: pb.SubmitFeedbackRequest, context: Context
    ) -> pb.SubmitFeedbackResponse:
        """One example to learn from."""
        job_id, sequence = await self._training.feedback.submit(request.example, request.request_id, request.model)
        return pb.SubmitFeedbackResponse(job_id=job_id, sequence=sequence)

    async def SaveCheckpoint(  # noqa: N802  the name of the RPC
        self, request: pb.SaveCheckpointRequest, context: Context
    ) -> pb.SaveCheckpointResponse:
        """Checkpoints of the nodes that trained a job."""
        return pb.SaveCheckpointResponse(checkpoints=await self._training.calls.save_checkpoint(request.job_id))

    async def ListCheckpoints(  # noqa: N802  the name of the RPC
        self, request: pb.ListCheckpointsRequest, context: Context
    ) -> pb.ListCheckpointsResponse:
        """Checkpoints of connected nodes."""
        return pb.ListCheckpointsResponse(checkpoints=await self._quality.listed(request.job_id))

    async def ExportCheckpoint(  # noqa: N802  the name of the RPC
        self, request: pb.ExportCheckpointRequest, context: Context
    ) -> pb.ExportCheckpointResponse:
        """A Hugging Face directory on the node that holds the checkpoint."""
        node_id = self._checkpoints.owner_of(request.checkpoint_id)
        report = await self._checkpoints.export(node_id, request.checkpoint_id, request.job_id)
        return pb.ExportCheckpointResponse(node_id=node_id, path=report.path)

    async def RestoreCheckpoint(  # noqa: N802  the name of the RPC
        self, request: pb.RestoreCheckpointRequest, context: Context
    ) -> pb.RestoreCheckpointResponse:
        """A node goes on from a checkpoint."""
        node_id = request.node_id or self._checkpoints.owner_of(request.checkpoint_id)
        report = await self._checkpoints.ask(node_id, "restore", request.checkpoint_id)
        return pb.RestoreCheckpointResponse(version=report.version)

    async def PublishCheckpoint(  # noqa: N802  the name of the RPC
        self, request: pb.PublishCheckpointRequest, context: Context
    ) -> pb.PublishCheckpointResponse:
        """Other nodes take over a checkpoint."""
        return pb.PublishCheckpointResponse(versions=await self._quality.publish(request))

    async def GetClusterState(  # noqa: N802  the name of the RPC
        self, request: pb.GetClusterStateRequest, context: Context
    ) -> pb.GetClusterStateResponse:
        """The cluster now."""
        snapshot = self._core.snapshot()
        status = status_to_proto(snapshot, self._not_ready_reason(len(snapshot.nodes)))
        add_predictions(status, self._core.op_records(), self._accuracy.errors())
        return pb.GetClusterStateResponse(status=status, adapters=self._training.adapters.models())

    async def ExplainTask(  # noqa: N802  the name of the RPC
        self, request: pb.ExplainTaskRequest, context: Context
    ) -> pb.ExplainTaskResponse:
        """Decisions about one task."""
        decisions = self._decisions.of_task(request.task_id)
        if not decisions and not self._decisions.is_live(request.task_id):
            message = f"task {request.task_id!r} is not among the newest {self._decisions.capacity} decisions"
            raise LemixError(ErrorCode.NOT_FOUND, message, param="task_id")
        return pb.ExplainTaskResponse(
            decisions=[decision_to_proto(decision) for decision in decisions],
            waits=waits_to_proto(self._decisions.waits(request.task_id)),
            now_monotonic_s=self._clock.monotonic_s(),
        )

    async def ListDecisions(  # noqa: N802  the name of the RPC
        self, request: pb.ListDecisionsRequest, context: Context
    ) -> pb.ListDecisionsResponse:
        """The newest decisions."""
        newest = self._decisions.newest(min(request.limit or _LISTED_DECISIONS, _MAX_LISTED_DECISIONS))
        return pb.ListDecisionsResponse(
            decisions=[decision_to_proto(decision) for decision in newest], now_monotonic_s=self._clock.monotonic_s()
        )

    def _not_ready_reason(self, num_nodes: int) -> str:
        if self._guard.outage:
            return self._guard.outage
        if num_nodes:
            return ""
        joining = self._nodes.joining
        return f"measuring {', '.join(joining)}" if joining else "no node has joined"


async def _next_part(requests: AsyncIterator[pb.StoreFileRequest]) -> pb.StoreFileRequest | None:
    try:
        async with asyncio.timeout(_UPLOAD_TIMEOUT_S):
            return await anext(requests, None)
    except TimeoutError as error:
        raise LemixError(ErrorCode.DEADLINE_EXCEEDED, "the upload has stalled") from error
