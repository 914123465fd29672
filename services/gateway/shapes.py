"""OpenAI's objects of generation: whole answers, and streams of chunks."""

import time
from collections.abc import Sequence
from typing import Any

from services.gateway import translate
from services.gateway.http_stream import encode_json, event
from services.gateway.types import Generation, OutputLogprob, Piece

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
        """A complete answer. The report of the first choice stands at the top, those of others with them."""
        choices = [
            {
                **self.choice(choice.text),
                "index": index,
                "logprobs": self.logprobs(choice.logprobs, 0) if choice.logprobs else None,
                "finish_reason": translate.finish_reason(choice.ending),
                **({"lemix": translate.lemix_report(choice.ending)} if index else {}),
            }
            for index, choice in enumerate(generation.choices)
        ]
        return {
            **self.envelope(generation.request_id, self.whole_object),
            "choices": choices,
            "usage": translate.usage(generation.usage),
            "lemix": translate.lemix_report(generation.choices[0].ending),
        }

    def opening(self, first: Piece) -> list[dict[str, Any]]:
        """Chunks before any text."""
        return []

    def chunk(
        self,
        piece: Piece,
        delta: dict[str, Any],
        finish_reason: str | None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """One event of a stream."""
        choice = {"index": piece.choice_index, **delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self.envelope(piece.request_id, self.chunk_object), "choices": [choice]}

    def logprobs(self, tokens: Sequence[OutputLogprob], offset: int) -> dict[str, Any]:
        """What is reported of tokens that begin at this character of the output."""
        return translate.completion_logprobs(tokens, offset)

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
        return [] if first.text or first.logprobs else [self.chunk(first, self.delta(None), None)]


class ChatShape(Shape):
    """/v1/chat/completions."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, first: Piece) -> list[dict[str, Any]]:
        """The role."""
        return [self.chunk(first, {"delta": {"role": "assistant", "content": ""}}, None)]

    def logprobs(self, tokens: Sequence[OutputLogprob], offset: int) -> dict[str, Any]:
        """Chats have a form of their own."""
        return translate.chat_logprobs(tokens)

    def choice(self, text: str) -> dict[str, Any]:
        """A message."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str | None) -> dict[str, Any]:
        """The text inside a chunk; None: the last one."""
        return {"delta": {} if text is None else {"content": text}}


class ChunkEncoder:
    """Events of one stream. What is the same in every chunk of text of a choice is encoded once."""

    def __init__(self, shape: Shape, *, include_usage: bool) -> None:
        """include_usage: the last event carries token counts."""
        self._shape = shape
        self._usage: dict[str, Any] = {"usage": None} if include_usage else {}
        #: By choice: what comes before and after the text of a chunk; characters that log-probabilities were told of.
        self._templates: dict[int, tuple[bytes, bytes]] = {}
        self._offsets: dict[int, int] = {}

    def encode(self, piece: Piece) -> bytes:
        """Text if there is any, then the ending, then the usage if asked for; before a choice's first piece its
        opening."""
        data = b"" if piece.choice_index in self._templates else self._open(piece)
        if piece.logprobs:
            data += self._with_logprobs(piece)
        elif piece.text:
            before, after = self._templates[piece.choice_index]
            data += before + encode_json(piece.text) + after
        if piece.ending is not None:
            data += self._end(piece)
        if piece.usage is not None and self._usage:
            envelope = self._shape.envelope(piece.request_id, self._shape.chunk_object)
            data += event({**envelope, "choices": [], "usage": translate.usage(piece.usage)})
        return data

    def _open(self, piece: Piece) -> bytes:
        shape = self._shape
        template = event({**shape.chunk(piece, shape.delta(_TEXT), None), **self._usage})
        before, after = template.split(encode_json(_TEXT))
        self._templates[piece.choice_index] = before, after
        return b"".join(event({**chunk, **self._usage}) for chunk in shape.opening(piece))

    def _with_logprobs(self, piece: Piece) -> bytes:
        offset = self._offsets.get(piece.choice_index, 0)
        self._offsets[piece.choice_index] = offset + sum(len(token.chosen.token) for token in piece.logprobs)
        logprobs = self._shape.logprobs(piece.logprobs, offset)
        return event({**self._shape.chunk(piece, self._shape.delta(piece.text), None, logprobs), **self._usage})

    def _end(self, piece: Piece) -> bytes:
        assert piece.ending is not None
        last = self._shape.chunk(piece, self._shape.delta(None), translate.finish_reason(piece.ending))
        return event({**last, "lemix": translate.lemix_report(piece.ending), **self._usage})
