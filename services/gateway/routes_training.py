"""REST routes of files, jobs and feedback."""

import asyncio
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from lemix.errors import ErrorCode, LemixError
from lemix.v1 import training_service_pb2
from services.gateway import translate_training as translate
from services.gateway.http_body import read_json
from services.gateway.http_stream import EventStream, event
from services.gateway.problems import HttpProblem
from services.gateway.schemas import FeedbackBody, JobBody
from services.gateway.training import TrainingService
from services.gateway.validation import invalid


class _TrainingRoutes:
    """Handlers over one training service: read, call, answer."""

    def __init__(self, training: TrainingService) -> None:
        self._training = training

    async def create_file(self, request: Request) -> JSONResponse:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "multipart/form-data":
            raise HttpProblem(415, "unsupported_media_type", "send the file as multipart/form-data")
        async with self._training.upload_slot(), request.form(max_files=1, max_fields=8) as form:
            if form.get("purpose") != "fine-tune":
                raise invalid("purpose must be 'fine-tune'", "purpose")
            upload = form.get("file")
            if not isinstance(upload, UploadFile):
                raise invalid("the form has no file named 'file'", "file")
            on_bad_line, on_long_line = form.get("on_bad_line", ""), form.get("on_long_line", "")
            if not (isinstance(on_bad_line, str) and isinstance(on_long_line, str)):
                raise invalid("on_bad_line and on_long_line are text", "on_bad_line")
            file = await self._training.create_file(
                upload.filename or "", await upload.read(), on_bad_line=on_bad_line, on_long_line=on_long_line
            )
        return JSONResponse(translate.file_object(file))

    async def get_file(self, request: Request) -> JSONResponse:
        return JSONResponse(translate.file_object(await self._training.get_file(request.path_params["file_id"])))

    async def create_job(self, request: Request) -> JSONResponse:
        body = await read_json(request, JobBody)
        wanted = translate.job_request(body, request.headers.get("x-request-id", ""))
        return JSONResponse(translate.job_object(await self._training.create_job(wanted)))

    async def list_jobs(self, request: Request) -> JSONResponse:
        # The scheduler lists from the newest on; `after` (OpenAI's cursor) picks the rest of the newest hundred.
        limit = _integer(request, "limit", 20)
        after = request.query_params.get("after")
        jobs = await self._training.list_jobs(limit if limit < 1 or limit > 100 else 100)
        if after is not None:
            ids = [job.job_id for job in jobs]
            if after not in ids:
                raise LemixError(ErrorCode.NOT_FOUND, f"there is no job {after[:100]!r}", param="after")
            jobs = jobs[ids.index(after) + 1 :]
        return JSONResponse(_page([translate.job_object(job) for job in jobs[:limit]], len(jobs) > limit))

    async def get_job(self, request: Request) -> JSONResponse:
        return JSONResponse(translate.job_object(await self._training.get_job(request.path_params["job_id"])))

    async def cancel_job(self, request: Request) -> JSONResponse:
        return JSONResponse(translate.job_object(await self._training.cancel_job(request.path_params["job_id"])))

    async def pause_job(self, request: Request) -> JSONResponse:
        return JSONResponse(translate.job_object(await self._training.pause_job(request.path_params["job_id"])))

    async def resume_job(self, request: Request) -> JSONResponse:
        return JSONResponse(translate.job_object(await self._training.resume_job(request.path_params["job_id"])))

    async def delete_model(self, request: Request) -> JSONResponse:
        model_id = request.path_params["model_id"]
        await self._training.delete_model(model_id)
        return JSONResponse({"id": model_id, "object": "model", "deleted": True})

    async def events(self, request: Request) -> ASGIApp:
        job_id = request.path_params["job_id"]
        # OpenAI's lists run from new to old: the page after an event holds older ones. A stream goes on to newer ones.
        after = _sequence(job_id, request.query_params.get("after"))
        if request.query_params.get("stream", "").lower() in ("true", "1"):
            await self._training.get_job(job_id)  # an unknown job still gets a proper 404
            watch = self._training.watch_job(job_id, after)
            return EventStream(watch, lambda message: event(translate.event_object(job_id, message.event)))
        found, more = await self._training.list_events(job_id, after, _integer(request, "limit", 20))
        return JSONResponse(_page([translate.event_object(job_id, item) for item in found], more))

    async def save_checkpoint(self, request: Request) -> JSONResponse:
        saved = await self._training.save_checkpoint(request.path_params["job_id"])
        return JSONResponse(_page([translate.checkpoint_object(item) for item in saved], False))

    async def list_checkpoints(self, request: Request) -> JSONResponse:
        found = await self._training.list_checkpoints(request.path_params.get("job_id", ""))
        return JSONResponse(_page([translate.checkpoint_object(item) for item in found], False))

    async def export_checkpoint(self, request: Request) -> JSONResponse:
        job_id = request.query_params.get("job_id", "")
        done = await self._training.export_checkpoint(request.path_params["checkpoint_id"], job_id)
        return JSONResponse({"object": "checkpoint.export", "node_id": done.node_id, "path": done.path})

    async def restore_checkpoint(self, request: Request) -> JSONResponse:
        node_id = request.query_params.get("node_id", "")
        version = await self._training.restore_checkpoint(request.path_params["checkpoint_id"], node_id)
        return JSONResponse({"object": "checkpoint.restored", "weight_version": translate.version_object(version)})

    async def publish_checkpoint(self, request: Request) -> JSONResponse:
        wanted = training_service_pb2.PublishCheckpointRequest(
            checkpoint_id=request.path_params["checkpoint_id"],
            node_ids=request.query_params.getlist("node_id"),
            force=request.query_params.get("force", "").lower() in ("true", "1"),
        )
        versions = await self._training.publish_checkpoint(wanted)
        served = [translate.version_object(version) for version in versions]
        return JSONResponse({"object": "checkpoint.published", "weight_versions": served})

    async def feedback(self, request: Request) -> JSONResponse:
        body = await read_json(request, FeedbackBody)
        example = await asyncio.to_thread(translate.feedback_example, body, self._training.examples)
        request_id = body.request_id or request.headers.get("x-request-id", "")
        receipt = await self._training.submit_feedback(body.model, example, request_id)
        return JSONResponse({"object": "feedback", "job_id": receipt.job_id, "sequence": receipt.sequence})


def training_routes(training: TrainingService) -> list[Route]:
    """/v1/files, /v1/fine_tuning/jobs, /v1/feedback, and the deletion of the models of isolated jobs."""
    handlers = _TrainingRoutes(training)
    jobs = "/v1/fine_tuning/jobs"
    return [
        Route("/v1/files", handlers.create_file, methods=["POST"]),
        Route("/v1/files/{file_id}", handlers.get_file, methods=["GET"]),
        Route(jobs, handlers.create_job, methods=["POST"]),
        Route(jobs, handlers.list_jobs, methods=["GET"]),
        Route(jobs + "/{job_id}", handlers.get_job, methods=["GET"]),
        Route(jobs + "/{job_id}/cancel", handlers.cancel_job, methods=["POST"]),
        Route(jobs + "/{job_id}/pause", handlers.pause_job, methods=["POST"]),
        Route(jobs + "/{job_id}/resume", handlers.resume_job, methods=["POST"]),
        Route(jobs + "/{job_id}/events", handlers.events, methods=["GET"]),
        Route(jobs + "/{job_id}/checkpoints", handlers.save_checkpoint, methods=["POST"]),
        Route(jobs + "/{job_id}/checkpoints", handlers.list_checkpoints, methods=["GET"]),
        Route("/v1/checkpoints", handlers.list_checkpoints, methods=["GET"]),
        Route("/v1/checkpoints/{checkpoint_id}/export", handlers.export_checkpoint, methods=["POST"]),
        Route("/v1/checkpoints/{checkpoint_id}/restore", handlers.restore_checkpoint, methods=["POST"]),
        Route("/v1/checkpoints/{checkpoint_id}/publish", handlers.publish_checkpoint, methods=["POST"]),
        Route("/v1/feedback", handlers.feedback, methods=["POST"]),
        Route("/v1/models/{model_id:path}", handlers.delete_model, methods=["DELETE"]),
    ]


def _page(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    return {"object": "list", "data": data, "has_more": has_more}


def _integer(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise invalid(f"{name} must be an integer", name) from None


def _sequence(job_id: str, event_id: str | None) -> int:
    """Position in the id of an event; 0 without one."""
    if event_id is None:
        return 0
    number = event_id.removeprefix(f"{job_id}-")
    if not number.isdecimal() or int(number) >= 2**63:
        raise invalid("after is not the id of an event of this job", "after")
    return int(number)
