"""A request as it is planned, and what its client saw of it. Times are seconds since the start of the traffic."""

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request: sent `at_s` after the start whatever the server does."""

    request_id: str
    at_s: float
    prompt: str
    #: True continuation whose loss is measured with the prompt; empty: none is.
    reference: str
    max_tokens: int
    #: A name for the part of the traffic it belongs to.
    kind: str


class Status(StrEnum):
    """How a request ended."""

    OK = "ok"
    #: Refused with 429 or 503 before it ran.
    REJECTED = "rejected"
    #: Any other error.
    FAILED = "failed"
    #: No end within the client's patience.
    UNFINISHED = "unfinished"


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request as its client saw it."""

    request_id: str
    kind: str
    #: When it was due, and when it was really sent.
    at_s: float
    sent_s: float
    status: Status
    first_token_s: float | None = None
    last_token_s: float | None = None
    output_tokens: int = 0
    node_id: str = ""
    weight_steps: tuple[int, ...] = ()
    staleness_s: float | None = None
    reference_loss: float | None = None
    error: str = ""

    @property
    def ttft_s(self) -> float | None:
        """From the moment it was due to its first token: a late client is no excuse."""
        return None if self.first_token_s is None else self.first_token_s - self.at_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None with fewer than two tokens."""
        if self.first_token_s is None or self.last_token_s is None or self.output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)
