"""REST routes of generation."""

import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from lemix.errors import LemixError
from services.gateway import translate
from services.gateway.generation import GenerationService
from services.gateway.http_body import read_json
from services.gateway.http_stream import DONE, EventStream, event, until_disconnect
from services.gateway.problems import error_body
from services.gateway.schemas import ChatBody, CompletionBody, GenerationBody
from services.gateway.types import Generation, GenerationRequest, Piece
from services.gateway.validation import invalid


def inference_routes(generation: GenerationService) -> list[Route]:
    """/v1/completions and /v1/chat/completions."""

    async def completions(request: Request) -> ASGIApp:
        body = await read_json(request, CompletionBody)
        wanted = translate.completion_request(body, request.headers)
        return await _answer(request, body, wanted, generation, _CompletionShape(generation.model))

    async def chat(request: Request) -> ASGIApp:
        body = await read_json(request, ChatBody)
        wanted = translate.chat_request(body, request.headers)
        return await _answer(request, body, wanted, generation, _ChatShape(generation.model))

    return [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]


async def _answer(
    request: Request, body: GenerationBody, wanted: GenerationRequest, generation: GenerationService, shape: "_Shape"
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
    events = _events(first, pieces, shape, include_usage)
    return EventStream(events, pieces, {"x-request-id": first.request_id})


async def _events(
    first: Piece, rest: AsyncGenerator[Piece], shape: "_Shape", include_usage: bool
) -> AsyncGenerator[bytes]:
    try:
        for value in shape.opening(first):
            yield event(value)
        for value in shape.chunks(first, include_usage):
            yield event(value)
        async for piece in rest:
            for value in shape.chunks(piece, include_usage):
                yield event(value)
        yield DONE
    except LemixError as error:
        yield event(error_body(error))


class _Shape:
    """What completions and chat completions have in common."""

    prefix = ""
    whole_object = ""
    chunk_object = ""

    def __init__(self, model: str) -> None:
        self._model = model
        self._created = int(time.time())

    def whole(self, generation: Generation) -> dict[str, Any]:
        """A complete answer."""
        ending = generation.ending
        choice = {**self.choice(generation.text), "index": 0, "logprobs": None}
        choice["finish_reason"] = translate.finish_reason(ending)
        return {
            **self._envelope(generation.request_id, self.whole_object),
            "choices": [choice],
            "usage": translate.usage(ending),
            "lemix": translate.lemix_report(ending),
        }

    def opening(self, first: Piece) -> list[dict[str, Any]]:
        """Chunks before any text."""
        return []

    def chunks(self, piece: Piece, include_usage: bool) -> list[dict[str, Any]]:
        """Chunks of one piece: text if there is any, then the ending, then the usage if asked for."""
        found = []
        if piece.text:
            found.append(self.chunk(piece.request_id, self.delta(piece.text), None))
        if piece.ending is not None:
            last = self.chunk(piece.request_id, self.delta(None), translate.finish_reason(piece.ending))
            found.append({**last, "lemix": translate.lemix_report(piece.ending)})
        if include_usage:
            found = [{**chunk, "usage": None} for chunk in found]
            if piece.ending is not None:
                envelope = self._envelope(piece.request_id, self.chunk_object)
                found.append({**envelope, "choices": [], "usage": translate.usage(piece.ending)})
        return found

    def chunk(self, request_id: str, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, **delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._envelope(request_id, self.chunk_object), "choices": [choice]}

    def choice(self, text: str) -> dict[str, Any]:
        """The text inside a whole answer."""
        return {"text": text}

    def delta(self, text: str | None) -> dict[str, Any]:
        """The text inside a chunk; None: the last one."""
        return {"text": text or ""}

    def _envelope(self, request_id: str, kind: str) -> dict[str, Any]:
        return {"id": f"{self.prefix}-{request_id}", "object": kind, "created": self._created, "model": self._model}


class _CompletionShape(_Shape):
    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def opening(self, first: Piece) -> list[dict[str, Any]]:
        # A first token without text (half a character, an end-of-sequence token) is still the first token.
        return [] if first.text else [self.chunk(first.request_id, self.delta(None), None)]


class _ChatShape(_Shape):
    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, first: Piece) -> list[dict[str, Any]]:
        return [self.chunk(first.request_id, {"delta": {"role": "assistant", "content": ""}}, None)]

    def choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str | None) -> dict[str, Any]:
        return {"delta": {} if text is None else {"content": text}}
