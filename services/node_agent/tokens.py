"""Fans the tokens of running requests out to the gateways that wait for them.

One buffer per request holds its whole output; a gateway's stream holds only how far it has read each of them. What is
to be sent is cut from the buffers when the stream can take it, so a slow gateway costs no memory and its chunks grow.

Messages of a stream are at least `flush_s` apart, except for first tokens and ends, which leave at once: a token costs
every process on its way far more as a message of its own than as one more number in a message.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import node_agent_service_pb2 as node_pb2
from lemix.internal.v1 import work_pb2
from services.runtime.clock import Clock

_MAX_ATTACHED = 16384
_MAX_FINISHED = 4096
#: Requests per message; with outputs of thousands of tokens this stays far below the largest message.
_MAX_CHUNKS = 256
_MAX_CHUNK_TOKENS = 4096
#: Where every token comes with log-probabilities, a few hundred bytes each.
_MAX_CHUNK_LOGPROBS = 64


@dataclass(slots=True)
class _Output:
    token_ids: list[int] = field(default_factory=list)
    #: One per token, or none at all.
    logprobs: list[work_pb2.TokenLogprobs] = field(default_factory=list)
    outcome: work_pb2.InferenceOutcome | None = None
    finished_s: float = 0.0


class TokenReader:
    """One gateway's stream: `attach` requests, iterate over `responses`."""

    def __init__(self, hub: "TokenHub", flush_s: float) -> None:
        self._hub = hub
        self._flush_s = flush_s
        self._sent_s = -flush_s
        self._timer: asyncio.TimerHandle | None = None
        #: Tokens sent by request, for every request this stream waits for.
        self.offsets: dict[str, int] = {}
        self._ready: dict[str, None] = {}
        #: There is something to send now, without waiting for `flush_s`.
        self._wake = asyncio.Event()
        self._ended = False
        self._attaching = True

    def attach(self, request_id: str, offset: int) -> None:
        """Wait for a request's tokens from `offset` on. Raises LemixError OVERLOADED beyond the bound.

        The request need not be known yet. Attaching again sets the offset anew.
        """
        if request_id not in self.offsets and len(self.offsets) >= _MAX_ATTACHED:
            raise LemixError(ErrorCode.OVERLOADED, f"a stream can wait for {_MAX_ATTACHED} requests at once")
        self.offsets[request_id] = offset
        self._hub.attached(self, request_id)

    def notify(self, request_id: str) -> None:
        """There may be something to send for this request. It is sent when the running step of the agent ends, or when
        the stream's next message is due."""
        self._ready[request_id] = None
        output = self._hub.output(request_id)
        if self.offsets.get(request_id) == 0 or (output is not None and output.outcome is not None):
            self._wake.set()
        elif self._timer is None and not self._wake.is_set():
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(self._sent_s + self._flush_s, self._due)

    def _due(self) -> None:
        self._timer = None
        self._wake.set()

    def end_attaching(self) -> None:
        """No more requests will be attached: `responses` ends when the outcomes of all have been taken."""
        self._attaching = False
        self._wake.set()

    def end(self) -> None:
        """Nothing more is wanted: `responses` ends now."""
        self._ended = True
        self._wake.set()

    async def responses(self) -> AsyncIterator[node_pb2.StreamTokensResponse]:
        """Messages for the gateway until `end`. A request is detached when its outcome has been taken."""
        try:
            while not self._ended and (self._attaching or self.offsets):
                await self._wake.wait()
                self._wake.clear()
                chunks = [chunk for chunk in map(self._cut, self._take_ready()) if chunk is not None]
                if not chunks:
                    continue
                self._sent_s = asyncio.get_running_loop().time()
                yield node_pb2.StreamTokensResponse(chunks=chunks)
                for chunk in chunks:
                    if chunk.HasField("outcome"):
                        self.offsets.pop(chunk.request_id, None)
                        self._hub.delivered(self, chunk.request_id)
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def _take_ready(self) -> list[str]:
        request_ids = list(self._ready)[:_MAX_CHUNKS]
        for request_id in request_ids:
            del self._ready[request_id]
        if self._ready:
            self._wake.set()
        return request_ids

    def _cut(self, request_id: str) -> node_pb2.TokenChunk | None:
        """What this stream has not had yet; None when there is nothing."""
        output = self._hub.output(request_id)
        offset = self.offsets.get(request_id)
        if output is None or offset is None:
            return None
        most = _MAX_CHUNK_LOGPROBS if output.logprobs else _MAX_CHUNK_TOKENS
        token_ids = output.token_ids[offset : offset + most]
        logprobs = output.logprobs[offset : offset + most]
        complete = offset + len(token_ids) >= len(output.token_ids)
        outcome = _streamed(output.outcome) if complete and output.outcome is not None else None
        if not token_ids and outcome is None:
            return None
        self.offsets[request_id] = offset + len(token_ids)
        if not complete:
            self._ready[request_id] = None
            self._wake.set()
        return node_pb2.TokenChunk(
            request_id=request_id, offset=offset, token_ids=token_ids, outcome=outcome, logprobs=logprobs
        )


def _streamed(outcome: work_pb2.InferenceOutcome) -> work_pb2.InferenceOutcome:
    """The outcome without what the stream has told already."""
    if not outcome.logprobs:
        return outcome
    shorter = work_pb2.InferenceOutcome()
    shorter.CopyFrom(outcome)
    shorter.ClearField("logprobs")
    return shorter


class TokenHub:
    """Outputs of the requests on this node. A finished one is kept until a gateway has taken it, at most `ttl_s`."""

    def __init__(self, clock: Clock, ttl_s: float, flush_s: float = 0.0) -> None:
        self._clock = clock
        self._ttl_s = ttl_s
        self._flush_s = flush_s
        self._outputs: dict[str, _Output] = {}
        # Finished outputs, the oldest first.
        self._finished: OrderedDict[str, None] = OrderedDict()
        self._readers: dict[TokenReader, None] = {}
        self._waiting: dict[str, dict[TokenReader, None]] = {}

    def open(self) -> TokenReader:
        """A new stream; the caller closes it."""
        reader = TokenReader(self, self._flush_s)
        self._readers[reader] = None
        return reader

    def close(self, reader: TokenReader) -> None:
        """Forget a stream. Outputs stay."""
        self._readers.pop(reader, None)
        for request_id in reader.offsets:
            self._detach(reader, request_id)

    def end_all(self) -> None:
        """End every stream; the node stops."""
        for reader in self._readers:
            reader.end()

    def begin(self, request_id: str) -> None:
        """The node took a request, perhaps again (then its output starts anew; offsets of readers stay valid)."""
        self._outputs[request_id] = _Output()
        self._finished.pop(request_id, None)

    def append(
        self, request_id: str, token_ids: Sequence[int], logprobs: Sequence[work_pb2.TokenLogprobs] = ()
    ) -> None:
        """New tokens. logprobs: one per token, or never any. Raises KeyError for a request that was not begun."""
        output = self._outputs[request_id]
        output.token_ids.extend(token_ids)
        output.logprobs.extend(logprobs)
        self._notify(request_id)

    def finish(self, request_id: str, outcome: work_pb2.InferenceOutcome) -> None:
        """The request ended. One that was never begun (refused) gets an output of its own."""
        self._evict()
        output = self._outputs.setdefault(request_id, _Output())
        output.outcome = outcome
        output.finished_s = self._clock.monotonic_s()
        self._finished[request_id] = None
        self._notify(request_id)

    # ------------------------------------------------------------- for readers

    def attached(self, reader: TokenReader, request_id: str) -> None:
        """A reader waits for this request."""
        self._waiting.setdefault(request_id, {})[reader] = None
        reader.notify(request_id)

    def output(self, request_id: str) -> _Output | None:
        """The request's output; None when unknown."""
        return self._outputs.get(request_id)

    def delivered(self, reader: TokenReader, request_id: str) -> None:
        """A reader has taken the outcome."""
        self._detach(reader, request_id)
        self._drop(request_id)

    # ------------------------------------------------------------- internals

    def _notify(self, request_id: str) -> None:
        for reader in self._waiting.get(request_id, ()):
            reader.notify(request_id)

    def _detach(self, reader: TokenReader, request_id: str) -> None:
        readers = self._waiting.get(request_id)
        if readers is not None:
            readers.pop(reader, None)
            if not readers:
                del self._waiting[request_id]

    def _drop(self, request_id: str) -> None:
        output = self._outputs.get(request_id)
        if output is not None and output.outcome is not None and request_id not in self._waiting:
            del self._outputs[request_id]
            self._finished.pop(request_id, None)

    def _evict(self) -> None:
        """Drop finished outputs nobody fetched in time, and the oldest beyond the bound."""
        oldest_s = self._clock.monotonic_s() - self._ttl_s
        while self._finished:
            request_id = next(iter(self._finished))
            if len(self._finished) < _MAX_FINISHED and self._outputs[request_id].finished_s > oldest_s:
                return
            del self._finished[request_id]
            del self._outputs[request_id]
