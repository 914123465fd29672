"""REST routes of generation."""

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from services.gateway import translate
from services.gateway.generation import GenerationService
from services.gateway.http_body import read_json
from services.gateway.http_stream import EventStream, until_disconnect
from services.gateway.schemas import ChatBody, CompletionBody, GenerationBody
from services.gateway.shapes import ChatShape, ChunkEncoder, CompletionShape, Shape
from services.gateway.types import GenerationRequest
from services.gateway.validation import invalid


def inference_routes(generation: GenerationService) -> list[Route]:
    """/v1/completions and /v1/chat/completions."""

    async def completions(request: Request) -> ASGIApp:
        body = await read_json(request, CompletionBody)
        wanted = translate.completion_request(body, request.headers)
        return await _answer(request, body, wanted, generation, CompletionShape(generation.model_of(wanted)))

    async def chat(request: Request) -> ASGIApp:
        body = await read_json(request, ChatBody)
        wanted = translate.chat_request(body, request.headers)
        return await _answer(request, body, wanted, generation, ChatShape(generation.model_of(wanted)))

    return [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]


async def _answer(
    request: Request, body: GenerationBody, wanted: GenerationRequest, generation: GenerationService, shape: Shape
) -> ASGIApp:
    if not body.stream:
        if body.stream_options is not None:
            raise invalid("stream_options needs stream", "stream_options")
        whole = await until_disconnect(request, generation.generate(wanted))
        return JSONResponse(shape.whole(whole), headers={"x-request-id": whole.request_id})
    pieces = generation.stream(wanted)
    # The first piece decides the status: what is refused before it still gets a proper error answer.
    first = await until_disconnect(request, anext(pieces))
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    encoder = ChunkEncoder(shape, include_usage=include_usage)
    return EventStream(pieces, encoder.encode, first=first, headers={"x-request-id": first.request_id})
