"""One request on its way: what the scheduler and the nodes have said about it, and who waits for it."""

import asyncio
from collections.abc import Sequence
from enum import Enum

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2


class Stage(Enum):
    """How far a request has come. Only FINISHED is final; a reassignment goes back to ASSIGNED."""

    SUBMITTED = "submitted"
    ACCEPTED = "accepted"
    ASSIGNED = "assigned"
    FINISHED = "finished"


class PendingRequest:
    """State of one submitted request. Both links write, one consumer reads with `next_tokens`.

    Tokens are kept once, in order, whichever node sent them. After a reassignment the new node starts over with the
    same seed; what was delivered stays, and only what lies beyond is taken from the new node.
    The buffer is bounded by the request's max_tokens.
    """

    def __init__(self, request_id: str, work: work_pb2.InferenceWork) -> None:
        self.request_id = request_id
        self.work = work
        self.stage = Stage.SUBMITTED
        self.node_id = ""
        self.node_address = ""
        self.cancel_sent = False
        #: Times it was begun anew because an earlier attempt under its id had been cancelled.
        self.num_restarts = 0
        self.outcome: work_pb2.InferenceOutcome | None = None
        #: One per token received, or none at all.
        self.logprobs: list[work_pb2.TokenLogprobs] = []
        self._tokens: list[int] = []
        self._read = 0
        self._error: LemixError | None = None
        self._changed = asyncio.Event()

    @property
    def num_received(self) -> int:
        """Tokens received so far."""
        return len(self._tokens)

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.stage is Stage.FINISHED

    def on_accepted(self) -> None:
        """The scheduler holds the request."""
        if self.stage is Stage.SUBMITTED:
            self.stage = Stage.ACCEPTED

    def on_assigned(self, node_id: str, node_address: str) -> None:
        """A node has the request; any earlier node's tokens are ignored from now on."""
        if not self.finished:
            self.stage = Stage.ASSIGNED
            self.node_id, self.node_address = node_id, node_address

    def on_tokens(
        self,
        node_address: str,
        offset: int,
        token_ids: Sequence[int],
        logprobs: Sequence[work_pb2.TokenLogprobs] = (),
    ) -> None:
        """Tokens from a node. A gap before them is a fault of the node and fails the request."""
        if self.finished or node_address != self.node_address:
            return
        if offset > len(self._tokens):
            message = f"node {self.node_id} skipped tokens {len(self._tokens)} to {offset - 1}"
            self.on_failed(LemixError(ErrorCode.INTERNAL, message))
            return
        fresh = len(self._tokens) - offset
        self.logprobs.extend(logprobs[fresh:])
        self._tokens.extend(token_ids[fresh:])
        self._changed.set()

    def on_finished(self, outcome: work_pb2.InferenceOutcome) -> None:
        """The request has ended; tokens that did not arrive on the stream are in the outcome."""
        if self.finished:
            return
        self.logprobs.extend(outcome.logprobs[len(self._tokens) :])
        self._tokens.extend(outcome.token_ids[len(self._tokens) :])
        self.outcome = outcome
        if outcome.HasField("error"):
            self._error = LemixError.from_proto(outcome.error)
        self._end()

    def is_foreign_cancel(self, outcome: work_pb2.InferenceOutcome) -> bool:
        """Whether this is the end of an earlier attempt under the same id, whose client left."""
        return outcome.finish_reason == types_pb2.FINISH_REASON_CANCELLED and not (self.cancel_sent or self.finished)

    def on_restart(self) -> None:
        """It is submitted anew; what was received stays, as after a reassignment."""
        self.num_restarts += 1
        self.stage, self.node_id, self.node_address = Stage.SUBMITTED, "", ""

    def on_failed(self, error: LemixError) -> None:
        """The request was refused or cannot be finished."""
        if not self.finished:
            self._error = error
            self._end()

    async def next_tokens(self) -> list[int]:
        """Tokens not read yet; waits for some. Empty: the request has ended well. Raises its error otherwise."""
        while self._read == len(self._tokens) and not self.finished:
            self._changed.clear()
            await self._changed.wait()
        fresh = self._tokens[self._read :]
        self._read += len(fresh)
        if not fresh and self._error is not None:
            raise self._error
        return fresh

    async def wait_finished(self) -> None:
        """Return when the request has ended, however."""
        while not self.finished:
            self._changed.clear()
            await self._changed.wait()

    def _end(self) -> None:
        self.stage = Stage.FINISHED
        self._changed.set()
