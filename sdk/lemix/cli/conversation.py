"""A conversation that outlives the model's context."""

from collections.abc import Iterator

from lemix.client import Client
from lemix.errors import ErrorCode, LemixError
from lemix.types import GenerationChunk, GenerationOptions, Message


class Conversation:
    """Messages so far; the oldest go when the context cannot hold them and the reply, the system message never."""

    def __init__(self, client: Client, system: str, options: GenerationOptions) -> None:
        self._client = client
        self._system = [Message("system", system)] if system else []
        self._options = options
        self._turns: list[Message] = []
        #: Messages the newest reply had to do without that the one before it still had.
        self.dropped = 0

    def reply(self, line: str) -> Iterator[GenerationChunk]:
        """Answer a line, in pieces as they are produced.

        Raises LemixError; CONTEXT_LENGTH_EXCEEDED when the line alone does not fit: it is forgotten again.
        """
        turns, options, text = [*self._turns, Message("user", line)], self._options, ""
        self.dropped = 0
        while True:
            try:
                for chunk in self._client.stream_chat([*self._system, *turns], **options):
                    text += chunk.text
                    yield chunk
                break
            except LemixError as error:
                # It is refused before the first piece: nothing is ever yielded twice.
                if error.code is not ErrorCode.CONTEXT_LENGTH_EXCEEDED:
                    raise
                if len(turns) > 1:
                    del turns[:2]
                elif options.get("max_tokens") is not None:
                    options = {**options, "max_tokens": None}  # as many as the context leaves
                else:
                    raise
        self.dropped = len(self._turns) + 1 - len(turns)
        self._turns = [*turns, Message("assistant", text)]
