"""gRPC handlers of lemix.v1: convert, call, convert. Raised LemixErrors are mapped by the server's interceptor."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc.aio

from lemix.v1 import cluster_service_pb2 as cluster_pb
from lemix.v1 import cluster_service_pb2_grpc as cluster_grpc
from lemix.v1 import inference_service_pb2 as inference_pb
from lemix.v1 import inference_service_pb2_grpc as inference_grpc
from lemix.v1 import training_service_pb2 as training_pb
from lemix.v1 import training_service_pb2_grpc as training_grpc
from services.gateway import convert
from services.gateway.application import Application
from services.gateway.cluster import ClusterView
from services.gateway.generation import GenerationService
from services.gateway.training import MAX_WATCH_S, TrainingService
from services.runtime.grpc_server import GrpcServer

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

_DEFAULT_JOBS_LISTED = 20


def add_services(server: GrpcServer, application: Application) -> None:
    """Register the three public services."""
    server.add(
        inference_grpc.add_InferenceServiceServicer_to_server,
        InferenceHandlers(application.generation),
        "lemix.v1.InferenceService",
    )
    server.add(
        training_grpc.add_TrainingServiceServicer_to_server,
        TrainingHandlers(application.training),
        "lemix.v1.TrainingService",
    )
    server.add(
        cluster_grpc.add_ClusterServiceServicer_to_server,
        ClusterHandlers(application.cluster),
        "lemix.v1.ClusterService",
    )


class InferenceHandlers(inference_grpc.InferenceServiceServicer):
    """lemix.v1.InferenceService. A cancelled call closes the generation, which cancels the request."""

    def __init__(self, generation: GenerationService) -> None:
        self._generation = generation

    async def Generate(  # noqa: N802
        self, request: inference_pb.GenerateRequest, context: Context
    ) -> inference_pb.GenerateResponse:
        """The whole output."""
        wanted = convert.generation_request(request.spec, context.time_remaining())
        return convert.generate_response(await self._generation.generate(wanted), self._generation.model_of(wanted))

    async def GenerateStream(  # noqa: N802
        self, request: inference_pb.GenerateStreamRequest, context: Context
    ) -> AsyncGenerator[inference_pb.GenerateStreamResponse]:
        """The output in pieces."""
        wanted = convert.generation_request(request.spec, context.time_remaining())
        async with aclosing(self._generation.stream(wanted)) as pieces:
            async for piece in pieces:
                yield convert.stream_response(piece, self._generation.model_of(wanted))


class TrainingHandlers(training_grpc.TrainingServiceServicer):
    """lemix.v1.TrainingService."""

    def __init__(self, training: TrainingService) -> None:
        self._training = training

    async def CreateFile(  # noqa: N802
        self, request: training_pb.CreateFileRequest, context: Context
    ) -> training_pb.CreateFileResponse:
        """Store a training file."""
        async with self._training.upload_slot():
            file = await self._training.create_file(
                request.filename,
                request.content,
                on_bad_line=request.on_bad_line,
                on_long_line=request.on_long_line,
            )
            return convert.create_file_response(file)

    async def CreateJob(  # noqa: N802
        self, request: training_pb.CreateJobRequest, context: Context
    ) -> training_pb.CreateJobResponse:
        """Start a job."""
        return training_pb.CreateJobResponse(job=await self._training.create_job(request))

    async def GetJob(  # noqa: N802
        self, request: training_pb.GetJobRequest, context: Context
    ) -> training_pb.GetJobResponse:
        """One job."""
        return training_pb.GetJobResponse(job=await self._training.get_job(request.job_id))

    async def ListJobs(  # noqa: N802
        self, request: training_pb.ListJobsRequest, context: Context
    ) -> training_pb.ListJobsResponse:
        """Newest jobs."""
        return training_pb.ListJobsResponse(jobs=await self._training.list_jobs(request.limit or _DEFAULT_JOBS_LISTED))

    async def CancelJob(  # noqa: N802
        self, request: training_pb.CancelJobRequest, context: Context
    ) -> training_pb.CancelJobResponse:
        """Stop a job."""
        return training_pb.CancelJobResponse(job=await self._training.cancel_job(request.job_id))

    async def PauseJob(  # noqa: N802
        self, request: training_pb.PauseJobRequest, context: Context
    ) -> training_pb.PauseJobResponse:
        """Hold a job."""
        return training_pb.PauseJobResponse(job=await self._training.pause_job(request.job_id))

    async def ResumeJob(  # noqa: N802
        self, request: training_pb.ResumeJobRequest, context: Context
    ) -> training_pb.ResumeJobResponse:
        """Let a job go on."""
        return training_pb.ResumeJobResponse(job=await self._training.resume_job(request.job_id))

    async def DeleteModel(  # noqa: N802
        self, request: training_pb.DeleteModelRequest, context: Context
    ) -> training_pb.DeleteModelResponse:
        """Delete the model of an isolated job."""
        await self._training.delete_model(request.model)
        return training_pb.DeleteModelResponse()

    async def WatchJob(  # noqa: N802
        self, request: training_pb.WatchJobRequest, context: Context
    ) -> AsyncGenerator[training_pb.WatchJobResponse]:
        """Follow a job."""
        remaining_s = context.time_remaining()
        timeout_s = MAX_WATCH_S if remaining_s is None else min(remaining_s, MAX_WATCH_S)
        async with aclosing(self._training.watch_job(request.job_id, request.after_sequence, timeout_s)) as messages:
            async for message in messages:
                yield training_pb.WatchJobResponse(event=message.event, job=message.job)

    async def SubmitFeedback(  # noqa: N802
        self, request: training_pb.SubmitFeedbackRequest, context: Context
    ) -> training_pb.SubmitFeedbackResponse:
        """Hand over one example."""
        example = await asyncio.to_thread(convert.feedback_example, request, self._training.examples)
        receipt = await self._training.submit_feedback(request.model, example, request.request_id)
        return training_pb.SubmitFeedbackResponse(job_id=receipt.job_id, sequence=receipt.sequence)

    async def SaveCheckpoint(  # noqa: N802
        self, request: training_pb.SaveCheckpointRequest, context: Context
    ) -> training_pb.SaveCheckpointResponse:
        """Checkpoints of the nodes that trained a job."""
        return training_pb.SaveCheckpointResponse(checkpoints=await self._training.save_checkpoint(request.job_id))

    async def ListCheckpoints(  # noqa: N802
        self, request: training_pb.ListCheckpointsRequest, context: Context
    ) -> training_pb.ListCheckpointsResponse:
        """Checkpoints there are."""
        return training_pb.ListCheckpointsResponse(checkpoints=await self._training.list_checkpoints(request.job_id))

    async def ExportCheckpoint(  # noqa: N802
        self, request: training_pb.ExportCheckpointRequest, context: Context
    ) -> training_pb.ExportCheckpointResponse:
        """A Hugging Face directory of a checkpoint."""
        done = await self._training.export_checkpoint(request.checkpoint_id, request.job_id)
        return training_pb.ExportCheckpointResponse(node_id=done.node_id, path=done.path)

    async def RestoreCheckpoint(  # noqa: N802
        self, request: training_pb.RestoreCheckpointRequest, context: Context
    ) -> training_pb.RestoreCheckpointResponse:
        """A node goes on from a checkpoint."""
        version = await self._training.restore_checkpoint(request.checkpoint_id, request.node_id)
        return training_pb.RestoreCheckpointResponse(version=version)

    async def PublishCheckpoint(  # noqa: N802
        self, request: training_pb.PublishCheckpointRequest, context: Context
    ) -> training_pb.PublishCheckpointResponse:
        """Other nodes take over a checkpoint."""
        versions = await self._training.publish_checkpoint(request)
        return training_pb.PublishCheckpointResponse(versions=versions)


class ClusterHandlers(cluster_grpc.ClusterServiceServicer):
    """lemix.v1.ClusterService."""

    def __init__(self, cluster: ClusterView) -> None:
        self._cluster = cluster

    async def ListModels(  # noqa: N802
        self, request: cluster_pb.ListModelsRequest, context: Context
    ) -> cluster_pb.ListModelsResponse:
        """Models served."""
        return cluster_pb.ListModelsResponse(models=await self._cluster.models())

    async def GetStatus(  # noqa: N802
        self, request: cluster_pb.GetStatusRequest, context: Context
    ) -> cluster_pb.GetStatusResponse:
        """Nodes, queues, policy."""
        return await self._cluster.status()
