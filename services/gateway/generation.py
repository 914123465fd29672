"""Generation: from a request to its pieces of text, whoever asks."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import work_pb2
from services.gateway import metrics
from services.gateway.choice import ChoiceRun
from services.gateway.merge import merged
from services.gateway.pending import PendingRequest
from services.gateway.prompts import PromptBuilder
from services.gateway.scheduler_link import SchedulerLink
from services.gateway.tokenizer import ModelTokenizer
from services.gateway.types import Choice, Generation, GenerationRequest, OutputLogprob, Piece, Usage
from services.gateway.validation import check_choices, check_id
from services.runtime.clock import Clock

_RETRY_AFTER_S = 1.0
#: Longest prompt that is tokenised on the event loop.
_MAX_INLINE_CHARS = 4096
_SEED_MASK = (1 << 64) - 1


class GenerationService:
    """Runs requests against the cluster.

    Every request has a deadline. Whoever stops waiting before the end (disconnect, deadline, stop string) makes the
    request be cancelled at the scheduler, so that its place and its KV cache are freed.

    Every output wanted is a task of its own in the cluster. All of them are submitted or none, and when one fails the
    others are cancelled.
    """

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        prompts: PromptBuilder,
        link: SchedulerLink,
        clock: Clock,
        *,
        gateway_id: str,
        request_timeout_s: float,
        max_concurrent_requests: int,
    ) -> None:
        """max_concurrent_requests: outputs in progress at once."""
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._link = link
        self._clock = clock
        self._gateway_id = gateway_id
        self._request_timeout_s = request_timeout_s
        self._max_concurrent_requests = max_concurrent_requests
        self._num_active = 0

    def model_of(self, request: GenerationRequest) -> str:
        """Id of the model that answers a request."""
        return request.model or self._prompts.model

    async def generate(self, request: GenerationRequest) -> Generation:
        """The whole output. Errors as `stream`."""
        collected: dict[int, _Collected] = {}
        async with aclosing(self.stream(request)) as pieces:
            async for piece in pieces:
                collected.setdefault(piece.choice_index, _Collected()).add(piece)
                if piece.usage is not None:
                    choices = tuple(collected[index].choice() for index in sorted(collected))
                    return Generation(request_id=piece.request_id, choices=choices, usage=piece.usage)
        raise LemixError(ErrorCode.INTERNAL, "the generation ended without an ending")

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Piece]:
        """The output as it is produced, choices interleaved; the last piece carries the usage.

        Raises INVALID_REQUEST, MODEL_NOT_FOUND, CONTEXT_LENGTH_EXCEEDED, UNSUPPORTED, OVERLOADED, UNAVAILABLE,
        DEADLINE_EXCEEDED, NODE_LOST, STALE_WEIGHTS and what the cluster reports. Close the iterator to cancel the
        request.
        """
        arrival_s = self._clock.monotonic_s()
        check_choices(request.n)
        self._admit(request.n)
        result = "cancelled"
        try:
            timeout_s = self._timeout_s(request)
            deadline = asyncio.get_running_loop().time() + timeout_s
            runs = await self._submit(request, arrival_s)
            # One timer for the whole request: a timeout around every wait costs more than the wait.
            timer = asyncio.get_running_loop().call_at(deadline, self._expire, runs, timeout_s)
            try:
                async with aclosing(self._pieces(runs)) as pieces:
                    async for piece in pieces:
                        yield piece
                result = "ok"
            finally:
                timer.cancel()
                for run in runs:
                    self._link.cancel(run.pending)
                    self._link.release(run.pending)
        except LemixError as error:
            result = error.code.value
            raise
        finally:
            self._num_active -= request.n
            metrics.GENERATIONS_IN_FLIGHT.dec(request.n)
            metrics.GENERATIONS.labels(result).inc()

    async def _pieces(self, runs: Sequence[ChoiceRun]) -> AsyncGenerator[Piece]:
        """Pieces of all choices; the last one with the usage of all."""
        sources = [run.pieces(self._link) for run in runs]
        left, completion_tokens = len(runs), 0
        async with aclosing(sources[0] if left == 1 else merged(sources)) as pieces:
            async for piece in pieces:
                if piece.ending is not None:
                    left -= 1
                    completion_tokens += piece.ending.completion_tokens
                    if not left:
                        usage = Usage(prompt_tokens=piece.ending.prompt_tokens, completion_tokens=completion_tokens)
                        piece = replace(piece, usage=usage)
                yield piece

    def _expire(self, runs: Sequence[ChoiceRun], timeout_s: float) -> None:
        for run in runs:
            self._link.cancel(run.pending)
            run.pending.on_failed(LemixError(ErrorCode.DEADLINE_EXCEEDED, f"not finished within {timeout_s:g} s"))

    def _admit(self, num_choices: int) -> None:
        if num_choices > self._max_concurrent_requests:
            message = f"n is {num_choices}; {self._max_concurrent_requests} outputs can be in progress at once"
            raise LemixError(ErrorCode.INVALID_REQUEST, message, param="n")
        if self._num_active + num_choices > self._max_concurrent_requests:
            raise LemixError(
                ErrorCode.OVERLOADED,
                f"{self._num_active} of {self._max_concurrent_requests} requests are in progress already",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._num_active += num_choices
        metrics.GENERATIONS_IN_FLIGHT.inc(num_choices)

    async def _submit(self, request: GenerationRequest, arrival_s: float) -> list[ChoiceRun]:
        check_id(request.request_id, "request_id")
        # Long prompts take milliseconds per hundred thousand characters: off the loop, so that streams do not stall.
        # For the others the way to a thread and back would take longer than the work.
        if request.num_chars > _MAX_INLINE_CHARS:
            work = await asyncio.to_thread(self._prompts.work, request)
        else:
            work = self._prompts.work(request)
        arrival_unix_s = self._clock.unix_s()
        work.gateway_id = self._gateway_id
        work.arrival_unix_s = arrival_unix_s
        work.deadline_unix_s = arrival_unix_s + self._timeout_s(request)
        request_id = request.request_id or uuid.uuid4().hex
        runs = [
            ChoiceRun(
                PendingRequest(_task_id(request_id, index), _work_of_choice(work, request_id, index)),
                request.sampling,
                self._tokenizer,
                self._clock,
                arrival_s,
                request_id=request_id,
                index=index,
            )
            for index in range(request.n)
        ]
        self._link.submit([run.pending for run in runs])
        metrics.PROMPT_TOKENS.inc(len(work.prompt_token_ids))
        return runs

    def _timeout_s(self, request: GenerationRequest) -> float:
        return min(self._request_timeout_s, request.timeout_s or self._request_timeout_s)


def _task_id(request_id: str, index: int) -> str:
    """Ids of clients have no '#', so that none names another's choice."""
    return f"{request_id}#{index}" if index else request_id


def _work_of_choice(work: work_pb2.InferenceWork, first_id: str, index: int) -> work_pb2.InferenceWork:
    """Choice i is what the request would give alone with its seed + i. The first one stands for all where once is
    enough: the reference is measured with it, and it is the session's turn."""
    if not index:
        return work
    own = work_pb2.InferenceWork()
    own.CopyFrom(work)
    own.sampling.seed = (work.sampling.seed + index) & _SEED_MASK
    own.session_id = ""
    own.choice_of = first_id
    del own.reference_token_ids[:]
    return own


class _Collected:
    """The pieces of one choice so far."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[OutputLogprob] = []
        self._last: Piece | None = None

    def add(self, piece: Piece) -> None:
        self._texts.append(piece.text)
        self._tokens.extend(piece.token_ids)
        self._logprobs.extend(piece.logprobs)
        self._last = piece

    def choice(self) -> Choice:
        if self._last is None or self._last.ending is None:
            raise LemixError(ErrorCode.INTERNAL, "a choice ended without an ending")
        return Choice(
            text="".join(self._texts),
            token_ids=tuple(self._tokens),
            logprobs=tuple(self._logprobs),
            ending=self._last.ending,
        )
