"""What one run under one policy left behind. Times are seconds since the first planned moment of the traffic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from services.latency import OpKind


class Status(StrEnum):
    """How a request ended."""

    OK = "ok"
    #: Refused with 429 or 503 before it ran.
    REJECTED = "rejected"
    #: Any other error.
    FAILED = "failed"
    #: No end within the demo's patience.
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


@dataclass(frozen=True, slots=True)
class OpRecord:
    """One operation on one stage."""

    node_id: str
    stage: int
    op: OpKind
    begin_s: float
    end_s: float
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TaskSpan:
    """A task on a node, from its assignment to its end. `end_s` None: it had not ended when the run did."""

    task_id: str
    node_id: str
    training: bool
    assigned_s: float
    end_s: float | None
    ok: bool = False


@dataclass(frozen=True, slots=True)
class Slo:
    """Response-time promise."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Everything measured in one run under one policy."""

    policy: str
    #: Planned seconds, and when the last answer was there (at least the planned seconds).
    planned_s: float
    wall_s: float
    drift_s: float
    requests: Sequence[RequestRecord]
    ops: Sequence[OpRecord]
    spans: Sequence[TaskSpan]
    trained_tokens: int
    #: CPU seconds used in the run, by role.
    cpu_s: Mapping[str, float] = field(default_factory=dict)
    cores: int = 1
    #: Loss of every micro-batch that ended: (time, nats per token).
    training_loss: Sequence[tuple[float, float]] = ()
