"""OpenAI's objects of generation: whole answers, and streams of chunks."""

import time
from typing import Any

from services.gateway import translate
from services.gateway.http_stream import encode_json, event
from services.gateway.types import Generation, Piece

#: Stands for the text in a chunk that is encoded once per stream; no id and no model name can hold it.
_TEXT = "\0"


class Shape:
    """What completions and chat completions have in common. One per answer."""

    prefix = ""
    whole_object = ""
    chunk_object = ""

    def __init__(self, model: str) -> None:
        """model: id in every object."""
        self._model = model
        self._created = int(time.time())

    def whole(self, generation: Generation) -> dict[str, Any]:
        """A complete answer."""
        ending = generation.ending
        choice = {**self.choice(generation.text), "index": 0, "logprobs": None}
        choice["finish_reason"] = translate.finish_reason(ending)
        return {
            **self.envelope(generation.request_id, self.whole_object),
            "choices": [choice],
            "usage": translate.usage(ending),
            "lemix": translate.lemix_report(ending),
        }

    def opening(self, first: Piece) -> list[dict[str, Any]]:
        """Chunks before any text."""
        return []

    def chunk(self, request_id: str, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        """One event of a stream."""
        choice = {"index": 0, **delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self.envelope(request_id, self.chunk_object), "choices": [choice]}

    def choice(self, text: str) -> dict[str, Any]:
        """The text inside a whole answer."""
        return {"text": text}

    def delta(self, text: str | None) -> dict[str, Any]:
        """The text inside a chunk; None: the last one."""
        return {"text": text or ""}

    def envelope(self, request_id: str, kind: str) -> dict[str, Any]:
        """What every object begins with."""
        return {"id": f"{self.prefix}-{request_id}", "object": kind, "created": self._created, "model": self._model}


class CompletionShape(Shape):
    """/v1/completions."""

    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def opening(self, first: Piece) -> list[dict[str, Any]]:
        """A first token without text (half a character, an end-of-sequence token) is still the first token."""
        return [] if first.text else [self.chunk(first.request_id, self.delta(None), None)]


class ChatShape(Shape):
    """/v1/chat/completions."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, first: Piece) -> list[dict[str, Any]]:
        """The role."""
        return [self.chunk(first.request_id, {"delta": {"role": "assistant", "content": ""}}, None)]

    def choice(self, text: str) -> dict[str, Any]:
        """A message."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str | None) -> dict[str, Any]:
        """The text inside a chunk; None: the last one."""
        return {"delta": {} if text is None else {"content": text}}


class ChunkEncoder:
    """Events of one stream. What is the same in every chunk of text is encoded once."""

    def __init__(self, shape: Shape, first: Piece, *, include_usage: bool) -> None:
        """first: the piece the stream begins with. include_usage: the last event carries token counts."""
        self._shape = shape
        self._request_id = first.request_id
        self._usage: dict[str, Any] = {"usage": None} if include_usage else {}
        self._opening = b"".join(event({**chunk, **self._usage}) for chunk in shape.opening(first))
        template = event({**shape.chunk(first.request_id, shape.delta(_TEXT), None), **self._usage})
        self._before, self._after = template.split(encode_json(_TEXT))

    def encode(self, piece: Piece) -> bytes:
        """Text if there is any, then the ending, then the usage if asked for; before the first piece the opening."""
        data, self._opening = self._opening, b""
        if piece.text:
            data += self._before + encode_json(piece.text) + self._after
        return data if piece.ending is None else data + self._end(piece)

    def _end(self, piece: Piece) -> bytes:
        assert piece.ending is not None
        shape = self._shape
        last = shape.chunk(self._request_id, shape.delta(None), translate.finish_reason(piece.ending))
        data = event({**last, "lemix": translate.lemix_report(piece.ending), **self._usage})
        if self._usage:
            envelope = shape.envelope(self._request_id, shape.chunk_object)
            data += event({**envelope, "choices": [], "usage": translate.usage(piece.ending)})
        return data
