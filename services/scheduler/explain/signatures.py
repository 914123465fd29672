"""Three ways in which serving and training at once goes wrong, named while it does (docs/operations.md).

It watches a core's live tasks and hears of the memory failures that nodes report. It counts per second over a window,
so its memory is bounded by the window plus live work.
"""

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from services.latency import MOVES, OpKind
from services.scheduler.core.assignment import HELD_BACK
from services.scheduler.core.commands import Assign, Reject
from services.scheduler.core.events import OpFinished, TaskEnded
from services.scheduler.core.tasks import InferenceTask, SloTarget
from services.scheduler.explain.live import Live, LiveTasks
from services.scheduler.explain.types import Promise

_TRAINING_OPS: Final = (OpKind.TRAIN_FORWARD, OpKind.TRAIN_BACKWARD, OpKind.OPTIMIZER_STEP)
_MAX_MEMORY_FAILURES: Final = 1024


class Signature(StrEnum):
    """What goes wrong."""

    #: Requests miss their promise in numbers.
    SLO_COLLAPSE = "slo_collapse"
    #: Operations fail for want of memory although it was checked.
    MEMORY_EXHAUSTED = "memory_exhausted"
    #: Training is held back most of the time and its loss does not fall.
    TRAINING_STARVED = "training_starved"


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """When a signature begins; each ends at a milder value, so that it does not flap. Shares are 0-1."""

    #: What is looked at: this long until now, seconds.
    window_s: int = 30
    #: Share of promises kept below which serving has collapsed, and above which it has recovered; and the fewest
    #: requests that say anything.
    attainment: float = 0.8
    attainment_again: float = 0.9
    fewest_requests: int = 20
    #: Operations that ran out of memory.
    memory_failures: int = 3
    #: Share of the window in which training was held back while none ran.
    held_share: float = 0.5
    held_share_again: float = 0.25
    #: Losses needed in each half of the window to tell a trend, and the relative fall that counts as one.
    fewest_losses: int = 8
    loss_fall: float = 0.01


@dataclass(frozen=True, slots=True)
class Finding:
    """A signature that is there. numbers: what it was concluded from, units in the names; advice: the knob to turn."""

    signature: Signature
    since_s: float
    numbers: Mapping[str, float]
    advice: str


@dataclass(frozen=True, slots=True)
class Change:
    """A signature begins, or ends (`active` false): then the numbers are those at its end."""

    finding: Finding
    active: bool


@dataclass(slots=True, eq=False)
class _Second:
    """What happened in one second."""

    second: int
    arrived: int = 0
    kept: int = 0
    missed: int = 0
    trained: int = 0
    num_losses: int = 0
    sum_losses: float = 0.0
    held_s: float = 0.0
    inference_s: float = 0.0
    training_s: float = 0.0
    offloads: int = 0
    moves_s: float = 0.0


class Signatures:
    """Watches one core's `tasks`. `default_slo`: the promise of requests that carry none."""

    def __init__(self, tasks: LiveTasks, default_slo: SloTarget, thresholds: Thresholds | None = None) -> None:
        self._tasks = tasks
        self._default_slo = default_slo
        self._limits = Thresholds() if thresholds is None else thresholds
        self._seconds: deque[_Second] = deque([_Second(0)], maxlen=self._limits.window_s)
        #: Micro-batches on a node that are not through their backward.
        self._training: set[str] = set()
        self._held_id = ""
        self._last_s = 0.0
        self._memory_failures: deque[tuple[float, str]] = deque(maxlen=_MAX_MEMORY_FAILURES)
        self._active: dict[Signature, Finding] = {}
        tasks.watch(self)

    @property
    def active(self) -> tuple[Finding, ...]:
        """What is wrong now, as it was concluded when it began."""
        return tuple(self._active.values())

    def memory_failed(self, now_s: float, node_id: str) -> None:
        """An operation on a node failed with RESOURCE_EXHAUSTED."""
        self._memory_failures.append((now_s, node_id))

    def advance(self, now_s: float) -> Sequence[Change]:
        """The time of the step that the tasks take in next. Returns what began or ended; it looks once a second."""
        now_s = max(now_s, self._last_s)
        changes: Sequence[Change] = ()
        if self._held_id and not self._training:
            self._seconds[-1].held_s += now_s - self._last_s
        self._last_s = now_s
        if int(now_s) != self._seconds[-1].second:
            changes = self._look(now_s)
            self._seconds.append(_Second(int(now_s)))
        return changes

    # ------------------------------------------------------------- what the tasks tell

    def arrived(self, live: Live) -> None:
        """A request, and what it was promised."""
        task = live.task
        if not isinstance(task, InferenceTask):
            return
        self._seconds[-1].arrived += 1
        ttft_s, tpot_s = task.slo.ttft_s, task.slo.tpot_s
        ttft_s = self._default_slo.ttft_s if ttft_s is None else ttft_s
        tpot_s = self._default_slo.tpot_s if tpot_s is None else tpot_s
        if ttft_s is not None or tpot_s is not None:
            due_s = math.inf if ttft_s is None else task.arrival_s + ttft_s
            live.promise = Promise(due_s, math.inf if tpot_s is None else tpot_s)

    def placed(self, now_s: float, live: Live, command: Assign | None) -> None:
        """A micro-batch is no longer held back."""
        del now_s
        if isinstance(live.task, InferenceTask):
            return
        self._training.add(live.task.task_id)
        if command is not None:
            self._held_id = ""

    def deferred(self, now_s: float, live: Live, reason: str) -> None:
        """Training waits; is it held back?"""
        del now_s
        if not isinstance(live.task, InferenceTask):
            self._held_id = live.task.task_id if reason == HELD_BACK else ""

    def op_finished(self, op: OpFinished, lives: Sequence[Live]) -> None:
        """What stages were busy with, and first tokens."""
        second, seconds = self._seconds[-1], op.end_s - op.begin_s
        if op.op in _TRAINING_OPS:
            second.training_s += seconds
            if op.op is OpKind.TRAIN_BACKWARD and op.stage == 0 and op.part + 1 == op.parts:
                self._training.difference_update(op.task_ids)
        elif op.op in MOVES:
            second.moves_s += seconds
            second.offloads += op.op is OpKind.OFFLOAD
        else:
            second.inference_s += seconds
            if op.first_token:
                for live in lives:
                    if live.promise is not None:
                        live.promise.first_token_s = min(live.promise.first_token_s, op.end_s)

    def left(self, now_s: float, live: Live, ended: TaskEnded | None) -> None:
        """Was the promise kept; what did training learn."""
        self._training.discard(live.task.task_id)
        if ended is None:
            return
        second, promise = self._seconds[-1], live.promise
        if not isinstance(live.task, InferenceTask):
            second.trained += ended.ok
            if ended.loss is not None:
                second.num_losses += 1
                second.sum_losses += ended.loss
        elif promise is not None:
            # A first token whose trace was dropped came at the end at the latest.
            first_s = min(promise.first_token_s, now_s)
            kept = ended.ok and first_s <= promise.due_s
            kept &= ended.output_tokens < 2 or now_s - first_s <= promise.tpot_s * (ended.output_tokens - 1)
            second.kept += kept
            second.missed += not kept

    def refused(self, now_s: float, live: Live, command: Reject) -> None:
        """A promise broken, if it was refused for now."""
        del now_s
        self._release(live)
        # A request that no node could ever run says nothing about the cluster.
        self._seconds[-1].missed += live.promise is not None and command.retry_after_s is not None

    def cancelled(self, live: Live) -> None:
        """Its promise no longer counts."""
        live.promise = None
        self._release(live)

    def _release(self, live: Live) -> None:
        if self._held_id == live.task.task_id:
            self._held_id = ""

    # ------------------------------------------------------------- what it means

    def _look(self, now_s: float) -> list[Change]:
        """Compare the window that ends now with the thresholds."""
        first = now_s - self._limits.window_s
        while len(self._seconds) > 1 and self._seconds[0].second < first:
            self._seconds.popleft()
        while self._memory_failures and self._memory_failures[0][0] < first:
            self._memory_failures.popleft()
        numbers = self._numbers(now_s)
        found = {
            Signature.SLO_COLLAPSE: self._has_collapsed(numbers),
            Signature.MEMORY_EXHAUSTED: self._is_out_of_memory(),
            Signature.TRAINING_STARVED: self._is_starved(numbers),
        }
        changes = []
        for signature, is_there in found.items():
            known = self._active.get(signature)
            if is_there and known is None:
                finding = Finding(signature, now_s, numbers, self._advice(signature, numbers))
                self._active[signature] = finding
                changes.append(Change(finding, active=True))
            elif known is not None and not is_there:
                del self._active[signature]
                changes.append(Change(Finding(signature, known.since_s, numbers, known.advice), active=False))
        return changes

    def _numbers(self, now_s: float) -> dict[str, float]:
        window = list(self._seconds)
        kept = sum(second.kept for second in window)
        promises = [live.promise for live in self._tasks if live.promise is not None]
        overdue = sum(promise.due_s < min(now_s, promise.first_token_s) for promise in promises)
        promised = kept + sum(second.missed for second in window) + overdue
        training_s = sum(second.training_s for second in window)
        moves_s = sum(second.moves_s for second in window)
        busy_s = training_s + moves_s + sum(second.inference_s for second in window)
        arrived = sum(second.arrived for second in window)
        peak = max(second.arrived for second in window)
        span_s = float(self._limits.window_s)
        return {
            "promises": promised,
            "attainment": kept / promised if promised else 1.0,
            "overdue": overdue,
            "requests_per_s": arrived / span_s,
            "peak_requests_per_s": float(peak),
            "training_share": training_s / busy_s if busy_s else 0.0,
            "held_share": min(1.0, sum(second.held_s for second in window) / span_s),
            "trained_per_s": sum(second.trained for second in window) / span_s,
            "loss_change": self._loss_change(now_s),
            "memory_failures": float(len(self._memory_failures)),
            "offloads": sum(second.offloads for second in window),
            "moving_share": moves_s / busy_s if busy_s else 0.0,
        }

    def _loss_change(self, now_s: float) -> float:
        """Mean loss of the newer half of the window relative to the older half, minus 1; 0: too few to tell."""
        middle = now_s - self._limits.window_s / 2
        older = [second for second in self._seconds if second.second < middle]
        newer = [second for second in self._seconds if second.second >= middle]
        num_older, num_newer = (sum(second.num_losses for second in half) for half in (older, newer))
        if min(num_older, num_newer) < self._limits.fewest_losses:
            return 0.0
        before, after = (sum(second.sum_losses for second in half) for half in (older, newer))
        return (after / num_newer) / (before / num_older) - 1.0 if before > 0.0 else 0.0

    def _has_collapsed(self, numbers: Mapping[str, float]) -> bool:
        limits = self._limits
        if Signature.SLO_COLLAPSE in self._active:
            return numbers["promises"] > 0 and numbers["attainment"] < limits.attainment_again
        return numbers["promises"] >= limits.fewest_requests and numbers["attainment"] < limits.attainment

    def _is_out_of_memory(self) -> bool:
        fewest = 1 if Signature.MEMORY_EXHAUSTED in self._active else self._limits.memory_failures
        return len(self._memory_failures) >= fewest

    def _is_starved(self, numbers: Mapping[str, float]) -> bool:
        limits = self._limits
        least = limits.held_share_again if Signature.TRAINING_STARVED in self._active else limits.held_share
        return numbers["held_share"] >= least and numbers["loss_change"] > -limits.loss_fall

    def _advice(self, signature: Signature, numbers: Mapping[str, float]) -> str:
        if signature is Signature.MEMORY_EXHAUSTED:
            (node_id, _) = Counter(node for _, node in self._memory_failures).most_common(1)[0]
            return (
                f"most on {node_id}: lower its kv_capacity_tokens, max_prefill_tokens or max_inflight_training, "
                "or the job's micro-batches"
            )
        if signature is Signature.TRAINING_STARVED:
            return "lower core.max_hold_back_s, make micro-batches smaller, or add nodes"
        if numbers["training_share"] >= 0.1:
            return "training is in the way: make micro-batches smaller, or raise core.max_hold_back_s"
        return "training is not in the way: add nodes, or lower core.max_waiting_inference to refuse sooner"
