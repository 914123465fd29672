"""Commands of the scheduler core, and the terms behind them.

Immutable; what is made for every candidate is a named tuple, which takes a fifth of the time of a frozen dataclass.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from services.latency import OpKind


class NodeTerms(NamedTuple):
    """Terms behind a decision for one candidate node, kept for `explain`.

    idleness_s: II, response_s: R, idleness_profit: IP, length_consistency: LC, score: what the policy compared (the
    largest wins). A term the policy does not look at is 0. `docs/scheduler.md` tells what R and score are per policy.
    cached_tokens: tokens of the prompt that the policy expects the node to keep of the session's turns before. tpot_s:
    predicted time per output token after the first, 0 where response_s covers them.
    """

    node_id: str
    idleness_s: float
    response_s: float
    idleness_profit: float
    length_consistency: float
    score: float
    cached_tokens: int = 0
    tpot_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Assign:
    """Move a task to a node's queue."""

    task_id: str
    node_id: str
    terms: tuple[NodeTerms, ...] = ()
    #: Pieces a micro-batch's forward and backward are to be cut into on every stage, so that requests get in between.
    parts: int = 1
    #: A request's place in the node's queue is that of one promised its first token so long after its arrival. None: as
    #: it was promised.
    queue_ttft_s: float | None = None


@dataclass(frozen=True, slots=True)
class Defer:
    """The task waits (no node, in-flight bound, or held back); it stays accepted. Sent once per reason."""

    task_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Reject:
    """The task will not run. `code` is a name of `lemix.errors.ErrorCode`."""

    task_id: str
    code: str
    message: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class CancelOnNode:
    """Tell a node to drop a task."""

    task_id: str
    node_id: str


@dataclass(frozen=True, slots=True)
class Drop:
    """A cancelled task that no node holds is to be closed in the ledger."""

    task_id: str


@dataclass(frozen=True, slots=True)
class TakeBack:
    """A micro-batch of a paused job that no node holds is to be forgotten; it is offered again when the job goes on."""

    task_id: str


class SyncMode(StrEnum):
    """How a synchronisation changes weights."""

    REPLACE = "replace"
    AVERAGE = "average"


@dataclass(frozen=True, slots=True)
class TakeSnapshot:
    """Phase one: the node copies its weights so that peers may fetch them."""

    sync_id: str
    node_id: str


@dataclass(frozen=True, slots=True)
class ApplyWeights:
    """Phase two: the node fetches the sources' snapshots and changes its weights."""

    sync_id: str
    node_id: str
    mode: SyncMode
    source_node_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WarnBehind:
    """The node lacks what others trained and is used all the same: so many rounds in a row could not bring it up to
    date."""

    node_id: str
    num_failed: int


@dataclass(frozen=True, slots=True)
class DriftAlarm:
    """Operations of one kind on one stage left the band around their profile, or (`active` False) came back into it.

    ratio: predicted now, after what was learnt, over profiled duration.
    """

    node_id: str
    stage: int
    op: OpKind
    active: bool
    ratio: float


Command = (
    Assign | Defer | Reject | CancelOnNode | Drop | TakeBack | TakeSnapshot | ApplyWeights | WarnBehind | DriftAlarm
)
