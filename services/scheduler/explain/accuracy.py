"""How far the responses predicted at assignment are from the real ones, with and without training on the node.

Pure, of constant size but for live requests. It must watch the tasks before `Decisions` does: it reads what came of a
decision when the task leaves, before that lets go of it.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from services.scheduler.core.commands import Assign, Reject
from services.scheduler.core.events import OpFinished, TaskEnded
from services.scheduler.core.residuals import MeanError
from services.scheduler.core.tasks import InferenceTask
from services.scheduler.explain.live import Live, LiveTasks
from services.scheduler.explain.types import Decision, Meaning


class Predicted(StrEnum):
    """What was predicted of a request."""

    #: From its arrival to its first token.
    TTFT = "ttft"
    #: From its arrival to its last token, given how many there were.
    RESPONSE = "response"


class PredictionError(NamedTuple):
    """error: running mean of |predicted - real| / real over `num_seen` requests. beside_training: those on nodes that
    trained, when the request was placed (TTFT) or at any time until its end (response)."""

    predicted: Predicted
    beside_training: bool
    num_seen: int
    error: float


@dataclass(slots=True)
class _Training:
    """Micro-batches on a node."""

    count: int = 0
    #: When the last one left.
    left_s: float = field(default=float("-inf"))


class Accuracy:
    """Feed it as a `Watcher` of `tasks`."""

    def __init__(self, tasks: LiveTasks) -> None:
        self._tasks = tasks
        self._training: defaultdict[str, _Training] = defaultdict(_Training)
        #: Requests that were placed beside training.
        self._beside: set[str] = set()
        self._errors: dict[tuple[Predicted, bool], MeanError] = {}
        tasks.watch(self)

    def errors(self) -> list[PredictionError]:
        """What has been seen so far."""
        known = sorted(self._errors.items())
        return [PredictionError(what, beside, error.count, error.value) for (what, beside), error in known]

    # ------------------------------------------------------------- what the tasks tell

    def arrived(self, live: Live) -> None:
        """Nothing is predicted yet."""

    def placed(self, now_s: float, live: Live, command: Assign | None) -> None:
        """What the node does besides."""
        del now_s
        training = self._training[live.node_id]
        if not isinstance(live.task, InferenceTask):
            training.count += 1
        elif command is not None and training.count:
            self._beside.add(live.task.task_id)

    def deferred(self, now_s: float, live: Live, reason: str) -> None:
        """Waiting is part of what is predicted when it is placed."""

    def op_finished(self, op: OpFinished, lives: Sequence[Live]) -> None:
        """`Decisions` notes it."""

    def left(self, now_s: float, live: Live, ended: TaskEnded | None) -> None:
        """A request that ended well tells how good its prediction was."""
        training = self._training[live.node_id]
        if not isinstance(live.task, InferenceTask):
            training.count -= 1
            training.left_s = now_s
            return
        was_beside = live.task.task_id in self._beside
        self._beside.discard(live.task.task_id)
        decision = live.decision
        if decision is None or ended is None or not ended.ok or decision.predicted_s is None:
            return
        is_beside = was_beside or training.count > 0 or training.left_s >= decision.at_s
        first_s, last_s = decision.outcome.first_token_s, decision.outcome.forward_end_s
        if decision.meaning is Meaning.FIRST_TOKEN and first_s is not None:
            self._observe(Predicted.TTFT, was_beside, decision.predicted_s, first_s - live.task.arrival_s)
        if last_s is not None:
            response_s = _response_s(decision, decision.predicted_s, ended.output_tokens)
            self._observe(Predicted.RESPONSE, is_beside, response_s, last_s - live.task.arrival_s)

    def refused(self, now_s: float, live: Live, command: Reject) -> None:
        """Nothing was predicted."""

    def cancelled(self, live: Live) -> None:
        """The end of the task tells."""

    def _observe(self, what: Predicted, beside: bool, predicted_s: float, real_s: float) -> None:
        if real_s > 0.0:
            errors = self._errors.setdefault((what, beside), MeanError())
            errors.observe(abs(predicted_s - real_s) / real_s)


def _response_s(decision: Decision, predicted_s: float, output_tokens: int) -> float:
    if decision.meaning is not Meaning.FIRST_TOKEN:
        return predicted_s
    tpot_s = next(terms.tpot_s for terms in decision.terms if terms.node_id == decision.node_id)
    return predicted_s + tpot_s * max(0, output_tokens - 1)
