"""One choice on its way: its text so far, and when its tokens came."""

import asyncio
from collections.abc import AsyncGenerator

import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.gateway import metrics
from services.gateway.pending import PendingRequest
from services.gateway.scheduler_link import SchedulerLink
from services.gateway.tokenizer import ModelTokenizer
from services.gateway.types import Ending, OutputLogprob, Piece, Sampling, TokenLogprob
from services.runtime.clock import Clock
from services.text import OutputText

_log = structlog.get_logger()

#: After a stop string the node is told to stop and asked, for this long, what it measured.
_REPORT_WAIT_S = 1.0


class ChoiceRun:
    """One submitted output."""

    def __init__(
        self,
        pending: PendingRequest,
        sampling: Sampling,
        tokenizer: ModelTokenizer,
        clock: Clock,
        arrival_s: float,
        *,
        request_id: str,
        index: int,
    ) -> None:
        """request_id: the client's; `pending` has one of its own. index: place of this choice, from 0."""
        self.pending = pending
        self._tokenizer = tokenizer
        self._clock = clock
        self._arrival_s = arrival_s
        self._request_id = request_id
        self._index = index
        self._first_s: float | None = None
        self._last_s = arrival_s
        self._text = OutputText(
            tokenizer.decode,
            sampling.stop,
            tokenizer.eos_token_ids,
            min_tokens=sampling.min_tokens,
            include_stop=sampling.include_stop_str_in_output,
        )

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
        """Stop the node, if it did not stop by itself, and give it a moment to tell which weights it used."""
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
        return Piece(
            request_id=self._request_id,
            text=text,
            token_ids=tuple(tokens),
            choice_index=self._index,
            logprobs=self._logprobs(tokens),
            ending=ending,
        )

    def _logprobs(self, tokens: list[int]) -> tuple[OutputLogprob, ...]:
        """Of the newest tokens."""
        if not self.pending.logprobs:
            return ()
        end = self._text.num_tokens
        found = self.pending.logprobs[end - len(tokens) : end]
        return tuple(
            OutputLogprob(
                self._token(token, logprobs.logprob),
                tuple(map(self._token, logprobs.top_token_ids, logprobs.top_logprobs)),
            )
            for token, logprobs in zip(tokens, found, strict=True)
        )

    def _token(self, token_id: int, logprob: float) -> TokenLogprob:
        return TokenLogprob(token_id, self._tokenizer.token_text(token_id), logprob)
