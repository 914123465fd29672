"""What one run under one policy left behind. Times are seconds since the first planned moment of the traffic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bench.live.requests import RequestRecord
from services.latency import OpKind


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
