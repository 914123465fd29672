"""Generation: from a request to its pieces of text, whoever asks."""

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.gateway import metrics
from services.gateway.output_text import OutputText
from services.gateway.pending import PendingRequest
from services.gateway.prompts import PromptBuilder
from services.gateway.scheduler_link import SchedulerLink
from services.gateway.tokenizer import ModelTokenizer
from services.gateway.types import Ending, Generation, GenerationRequest, Piece
from services.gateway.validation import check_id
from services.runtime.clock import Clock

_log = structlog.get_logger()

#: After a stop string the node is told to stop and asked, for this long, what it measured.
_REPORT_WAIT_S = 1.0
_RETRY_AFTER_S = 1.0
#: Longest prompt that is tokenised on the event loop.
_MAX_INLINE_CHARS = 4096


class GenerationService:
    """Runs requests against the cluster.

    Every request has a deadline. Whoever stops waiting before the end (disconnect, deadline, stop string) makes the
    request be cancelled at the scheduler, so that its place and its KV cache are freed.
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
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._link = link
        self._clock = clock
        self._gateway_id = gateway_id
        self._request_timeout_s = request_timeout_s
        self._max_concurrent_requests = max_concurrent_requests
        self._num_active = 0

    @property
    def model(self) -> str:
        """Id of the model served."""
        return self._prompts.model

    async def generate(self, request: GenerationRequest) -> Generation:
        """The whole output. Errors as `stream`."""
        texts: list[str] = []
        tokens: list[int] = []
        async with aclosing(self.stream(request)) as pieces:
            async for piece in pieces:
                texts.append(piece.text)
                tokens.extend(piece.token_ids)
                if piece.ending is not None:
                    return Generation(
                        request_id=piece.request_id, text="".join(texts), token_ids=tuple(tokens), ending=piece.ending
                    )
        raise LemixError(ErrorCode.INTERNAL, "the generation ended without an ending")

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Piece]:
        """The output as it is produced; the last piece carries the ending.

        Raises INVALID_REQUEST, MODEL_NOT_FOUND, CONTEXT_LENGTH_EXCEEDED, UNSUPPORTED, OVERLOADED, UNAVAILABLE,
        DEADLINE_EXCEEDED, NODE_LOST and what the cluster reports. Close the iterator to cancel the request.
        """
        arrival_s = self._clock.monotonic_s()
        self._admit()
        result = "cancelled"
        try:
            timeout_s = self._timeout_s(request)
            deadline = asyncio.get_running_loop().time() + timeout_s
            run = _Run(await self._submit(request), request, self._tokenizer, self._clock, arrival_s)
            # One timer for the whole request: a timeout around every wait costs more than the wait.
            timer = asyncio.get_running_loop().call_at(deadline, self._expire, run.pending, timeout_s)
            try:
                async with aclosing(run.pieces(self._link)) as pieces:
                    async for piece in pieces:
                        yield piece
                result = "ok"
            finally:
                timer.cancel()
                self._link.cancel(run.pending)
                self._link.release(run.pending)
        except LemixError as error:
            result = error.code.value
            raise
        finally:
            self._num_active -= 1
            metrics.GENERATIONS_IN_FLIGHT.dec()
            metrics.GENERATIONS.labels(result).inc()

    def _expire(self, pending: PendingRequest, timeout_s: float) -> None:
        self._link.cancel(pending)
        pending.on_failed(LemixError(ErrorCode.DEADLINE_EXCEEDED, f"not finished within {timeout_s:g} s"))

    def _admit(self) -> None:
        if self._num_active >= self._max_concurrent_requests:
            raise LemixError(
                ErrorCode.OVERLOADED,
                f"{self._max_concurrent_requests} requests are in progress already",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._num_active += 1
        metrics.GENERATIONS_IN_FLIGHT.inc()

    async def _submit(self, request: GenerationRequest) -> PendingRequest:
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
        pending = PendingRequest(request.request_id or uuid.uuid4().hex, work)
        self._link.submit(pending)
        metrics.PROMPT_TOKENS.inc(len(work.prompt_token_ids))
        return pending

    def _timeout_s(self, request: GenerationRequest) -> float:
        return min(self._request_timeout_s, request.timeout_s or self._request_timeout_s)


class _Run:
    """One submitted request: its text so far and when its tokens came."""

    def __init__(
        self,
        pending: PendingRequest,
        request: GenerationRequest,
        tokenizer: ModelTokenizer,
        clock: Clock,
        arrival_s: float,
    ) -> None:
        self.pending = pending
        self._clock = clock
        self._arrival_s = arrival_s
        self._first_s: float | None = None
        self._last_s = arrival_s
        self._text = OutputText(tokenizer.decode, request.sampling.stop, tokenizer.eos_token_ids)

    async def pieces(self, link: SchedulerLink) -> AsyncGenerator[Piece]:
        """The output until its end. Raises what the request failed with."""
        while tokens := await self.pending.next_tokens():
            self._last_s = self._clock.monotonic_s()
            if self._first_s is None:
                self._first_s = self._last_s
                metrics.TTFT_S.observe(self._first_s - self._arrival_s)
            text, used = self._text.add(tokens)
            metrics.OUTPUT_TOKENS.inc(len(used))
            if self._text.stopped:
                await self._stop_early(link)
                yield self._piece(text, used, self._ending(types_pb2.FINISH_REASON_STOP))
                return
            yield self._piece(text, used)
        text = self._text.finish()
        reason = types_pb2.FINISH_REASON_STOP if self._text.stopped else self._reported_reason()
        yield self._piece(text, [], self._ending(reason))

    async def _stop_early(self, link: SchedulerLink) -> None:
        """Stop the node, and give it a moment to tell which weights it used."""
        link.cancel(self.pending)
        try:
            async with asyncio.timeout(_REPORT_WAIT_S):
                await self.pending.wait_finished()
        except TimeoutError:
            _log.warning("no report after a stop string", request_id=self.pending.request_id)

    def _reported_reason(self) -> types_pb2.FinishReason:
        outcome = self.pending.outcome
        reason = outcome.finish_reason if outcome is not None else types_pb2.FINISH_REASON_ERROR
        if reason == types_pb2.FINISH_REASON_CANCELLED:
            raise LemixError(ErrorCode.CANCELLED, "the request was cancelled")
        if reason not in (types_pb2.FINISH_REASON_STOP, types_pb2.FINISH_REASON_LENGTH):
            raise LemixError(ErrorCode.INTERNAL, "the node reported no reason for the end")
        return reason

    def _ending(self, reason: types_pb2.FinishReason) -> Ending:
        num_tokens = self._text.num_tokens
        if self._first_s is not None and num_tokens > 1:
            metrics.TPOT_S.observe((self._last_s - self._first_s) / (num_tokens - 1))
        outcome = self.pending.outcome or work_pb2.InferenceOutcome()
        report = types_pb2.ServingReport()
        report.CopyFrom(outcome.report)
        report.node_id = report.node_id or self.pending.node_id
        return Ending(
            finish_reason=reason,
            prompt_tokens=outcome.prompt_tokens or len(self.pending.work.prompt_token_ids),
            completion_tokens=num_tokens,
            report=report,
            ttft_s=None if self._first_s is None else self._first_s - self._arrival_s,
        )

    def _piece(self, text: str, tokens: list[int], ending: Ending | None = None) -> Piece:
        return Piece(request_id=self.pending.request_id, text=text, token_ids=tuple(tokens), ending=ending)
