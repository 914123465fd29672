"""What is kept about a decision, and what its prediction means."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from services.scheduler.core.commands import NodeTerms
from services.scheduler.core.tasks import InferenceTask, Task


class Meaning(StrEnum):
    """What a policy's R (`NodeTerms.response_s`) predicts; `docs/scheduler.md` has the definitions."""

    #: Nothing: the policy does not look at it.
    NOTHING = ""
    #: From a request's arrival to its first token.
    FIRST_TOKEN = "first_token"
    #: From the release to the end of the last forward on the last stage. A request is released when it arrives, a
    #: micro-batch when it is placed; a request's decode iterations are part of its forward.
    FORWARD_END = "forward_end"


class Fate(StrEnum):
    """What became of a decision."""

    UNFINISHED = "unfinished"
    OK = "ok"
    FAILED = "failed"
    CANCELLED = "cancelled"
    #: The task waits again, and gets another decision.
    NODE_LOST = "node_lost"
    #: No node was chosen: `Decision.refusal` tells why.
    REFUSED = "refused"


_BY_FORECAST: Final = ("paper_additive", "paper_ratio", "paper_released")


def meaning(policy: str, task: Task) -> Meaning:
    """What R means for a task under a policy."""
    if policy in _BY_FORECAST:
        return Meaning.FORWARD_END
    return Meaning.FIRST_TOKEN if policy == "lemix" and isinstance(task, InferenceTask) else Meaning.NOTHING


@dataclass(slots=True, eq=False)
class Promise:
    """What a request was promised, until it is known to be kept. Seconds, infinite: not promised, or not yet."""

    due_s: float
    tpot_s: float
    first_token_s: float = math.inf


@dataclass(slots=True)
class Outcome:
    """What happened after a decision. Times on the scheduler's clock, seconds; None: not yet, or no trace tells."""

    fate: Fate = Fate.UNFINISHED
    #: Begin of the task's first operation on any stage.
    first_op_s: float | None = None
    first_token_s: float | None = None
    #: End of its newest forward (prefill and decode included) on the last stage.
    forward_end_s: float | None = None
    #: When the scheduler heard of the end, or of the loss of the node.
    ended_s: float | None = None
    output_tokens: int = 0


@dataclass(slots=True, eq=False)
class Decision:
    """A task placed on a node, or refused (then `node_id` is empty).

    waits: reason of each deferral since the task arrived or lost its node -> when it was first given, seconds.
    terms: of every candidate. kv_shares: for each of them, KV cache promised to the requests it held (prompt plus
    max_tokens) over its capacity; above 1 when requests wait there for room.
    """

    sequence: int
    at_s: float
    policy: str
    task: Task
    node_id: str
    waits: Mapping[str, float]
    terms: tuple[NodeTerms, ...] = ()
    kv_shares: tuple[float, ...] = ()
    parts: int = 1
    refusal: str = ""
    outcome: Outcome = field(default_factory=Outcome)

    @property
    def meaning(self) -> Meaning:
        """What R predicts here."""
        return meaning(self.policy, self.task)

    @property
    def predicted_s(self) -> float | None:
        """R of the chosen node; None: the policy predicts nothing."""
        if self.meaning is Meaning.NOTHING:
            return None
        return next((terms.response_s for terms in self.terms if terms.node_id == self.node_id), None)

    @property
    def actual_s(self) -> float | None:
        """What R predicted, as it happened; None: not known (yet), or nothing was predicted."""
        outcome = self.outcome
        if self.meaning is Meaning.FIRST_TOKEN:
            return None if outcome.first_token_s is None else outcome.first_token_s - self.task.arrival_s
        if self.meaning is Meaning.NOTHING or outcome.forward_end_s is None:
            return None
        if isinstance(self.task, InferenceTask):
            # Until it has ended well there may be another iteration.
            return outcome.forward_end_s - self.task.arrival_s if outcome.fate is Fate.OK else None
        return outcome.forward_end_s - self.at_s

    @property
    def error_s(self) -> float | None:
        """Real minus predicted."""
        actual_s, predicted_s = self.actual_s, self.predicted_s
        return None if actual_s is None or predicted_s is None else actual_s - predicted_s
