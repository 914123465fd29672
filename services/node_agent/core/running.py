"""Running requests, pieces of their prompts, and the ops made of these."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from services.latency import OpKind
from services.node_agent.core.types import InferenceRequest, Op


class Claim(NamedTuple):
    """What an op brings to the choice of a stage.

    ready_s: since when it could run. Its urgency is the share of its allowance used up: (now - origin_s) / allowance_s.
    """

    ready_s: float
    origin_s: float
    allowance_s: float


@dataclass(slots=True)
class RunningRequest:
    """An admitted request."""

    request: InferenceRequest
    tpot_s: float
    #: Prompt and generated tokens in the KV cache.
    context_tokens: int
    #: When its newest token was produced, or the newest piece of its prompt computed.
    last_token_s: float
    generated_tokens: int = 0
    cancelled: bool = False
    #: Leading tokens of its prompt whose KV cache it took over, from which request until an op has done it, how many
    #: tokens that one's has, and of which weights.
    cached_tokens: int = 0
    continued: str = ""
    kept_tokens: int = 0
    epoch: int = 0
    #: Leading tokens of its prompt that are in the KV cache, or in an op on its way.
    filled_tokens: int = 0


class Piece(NamedTuple):
    """What an op computes of a prompt: its tokens from `start` to `end`, and the reference behind its end. shares: all
    of it comes from the prompt of this request, which ends in the same op."""

    running: RunningRequest
    start: int
    end: int
    shares: str = ""

    @property
    def is_last(self) -> bool:
        """Whether it ends the prompt, so that the first token can be picked."""
        return self.end == self.running.request.prompt_tokens

    @property
    def new_tokens(self) -> int:
        """Tokens to compute."""
        return self.end - self.start + (self.running.request.reference_tokens if self.is_last else 0)


def prefill_op(op_id: int, version: int, pieces: Sequence[Piece]) -> Op:
    """The op that computes pieces of prompts."""
    task_ids = tuple(piece.running.request.task_id for piece in pieces)
    num_tokens = sum(piece.new_tokens for piece in pieces)
    batch = sum(not piece.shares for piece in pieces)
    op = Op(op_id, OpKind.PREFILL, task_ids, version, num_tokens, batch=batch)
    if any(piece.start or piece.running.continued for piece in pieces):
        cached_tokens = tuple(piece.start for piece in pieces)
        continued = tuple(piece.running.continued for piece in pieces)
        context_tokens = sum(piece.start for piece in pieces if not piece.shares)
        op = op._replace(context_tokens=context_tokens, cached_tokens=cached_tokens, continued=continued)
    if batch < len(pieces):
        op = op._replace(shares=tuple(piece.shares for piece in pieces))
    return op


def mixed_op(op_id: int, version: int, pieces: list[Piece], decode: Op | None) -> Op:
    """The op that computes pieces of prompts, and the next tokens of the requests that `decode` would have."""
    pieces = sorted(pieces, key=lambda piece: not piece.is_last)
    op = prefill_op(op_id, version, pieces)._replace(
        end_tokens=tuple(piece.end for piece in pieces),
        partials=sum(not piece.is_last for piece in pieces),
    )
    if decode is None:
        return op
    return op._replace(
        task_ids=op.task_ids + decode.task_ids, decodes=decode.batch, decode_context_tokens=decode.context_tokens
    )
