"""Three ways in which serving and training at once goes wrong, named while it does (docs/operations.md).

Pure like the core: fed with every step's (time, event, commands), and with the memory failures that nodes report. It
counts per second over a window, so its memory is bounded by the window plus live work.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from services.latency import MOVES, OpKind
from services.scheduler.core.scheduler import HELD_BACK
from services.scheduler.core.types import (
    Assign,
    CancelOnNode,
    Command,
    Defer,
    Drop,
    Event,
    InferenceTask,
    NodeLost,
    OpFinished,
    Reject,
    SloTarget,
    Task,
    TaskArrived,
    TaskEnded,
    TaskRecovered,
)

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


@dataclass(slots=True, eq=False)
class _Request:
    """A request whose promise is open. Times in seconds, infinite: not promised, or not yet."""

    due_s: float
    tpot_s: float
    first_token_s: float = float("inf")


class Signatures:
    """Watches one core. `default_slo`: the promise of requests that carry none."""

    def __init__(self, default_slo: SloTarget, thresholds: Thresholds | None = None) -> None:
        self._default_slo = default_slo
        self._limits = Thresholds() if thresholds is None else thresholds
        self._seconds: deque[_Second] = deque([_Second(0)], maxlen=self._limits.window_s)
        self._requests: dict[str, _Request] = {}
        #: Micro-batches on a node that are not through their backward.
        self._training: dict[str, str] = {}
        self._microbatches: set[str] = set()
        #: Node of every task that has one: reports of other nodes are late, and the core ignores them too.
        self._node_of: dict[str, str] = {}
        self._held_id = ""
        self._last_s = 0.0
        self._memory_failures: deque[tuple[float, str]] = deque(maxlen=_MAX_MEMORY_FAILURES)
        self._active: dict[Signature, Finding] = {}

    @property
    def active(self) -> tuple[Finding, ...]:
        """What is wrong now, as it was concluded when it began."""
        return tuple(self._active.values())

    @property
    def num_live(self) -> int:
        """Tasks remembered."""
        return len(self._requests) + len(self._microbatches)

    def memory_failed(self, now_s: float, node_id: str) -> None:
        """An operation on a node failed with RESOURCE_EXHAUSTED."""
        self._memory_failures.append((now_s, node_id))

    def add(self, now_s: float, event: Event, commands: Iterable[Command]) -> Sequence[Change]:
        """Take in one step of the core, in order. Returns what began or ended; it looks once a second."""
        now_s = max(now_s, self._last_s)
        changes: Sequence[Change] = ()
        second = self._seconds[-1]
        if self._held_id and not self._training:
            second.held_s += now_s - self._last_s
        self._last_s = now_s
        if int(now_s) != second.second:
            changes = self._look(now_s)
            second = _Second(int(now_s))
            self._seconds.append(second)
        if type(event) is OpFinished:
            self._op_finished(event, second)
        else:
            self._happened(now_s, event, second)
        for command in commands:
            self._commanded(command, second)
        return changes

    # ------------------------------------------------------------- what happened

    def _happened(self, now_s: float, event: Event, second: _Second) -> None:
        match event:
            case TaskArrived(task) | TaskRecovered(task):
                self._came(task, second)
                if isinstance(event, TaskRecovered):
                    self._placed(task.task_id, event.node_id)
            case TaskEnded():
                self._ended(now_s, event, second)
            case NodeLost(node_id):
                self._training = {task_id: node for task_id, node in self._training.items() if node != node_id}
            case _:
                pass

    def _came(self, task: Task, second: _Second) -> None:
        if not isinstance(task, InferenceTask):
            self._microbatches.add(task.task_id)
            return
        if task.task_id in self._requests:
            return
        second.arrived += 1
        ttft_s, tpot_s = task.slo.ttft_s, task.slo.tpot_s
        ttft_s = self._default_slo.ttft_s if ttft_s is None else ttft_s
        tpot_s = self._default_slo.tpot_s if tpot_s is None else tpot_s
        if ttft_s is not None or tpot_s is not None:
            due_s = float("inf") if ttft_s is None else task.arrival_s + ttft_s
            self._requests[task.task_id] = _Request(due_s, float("inf") if tpot_s is None else tpot_s)

    def _op_finished(self, op: OpFinished, second: _Second) -> None:
        if op.op in _TRAINING_OPS:
            second.training_s += op.end_s - op.begin_s
            if op.op is OpKind.TRAIN_BACKWARD and op.stage == 0 and op.part + 1 == op.parts:
                for task_id in op.task_ids:
                    self._training.pop(task_id, None)
            return
        if op.op in MOVES:
            second.moves_s += op.end_s - op.begin_s
            second.offloads += op.op is OpKind.OFFLOAD
            return
        second.inference_s += op.end_s - op.begin_s
        if op.first_token:
            for task_id in op.task_ids:
                request = self._requests.get(task_id)
                if request is not None:
                    request.first_token_s = min(request.first_token_s, op.end_s)

    def _ended(self, now_s: float, event: TaskEnded, second: _Second) -> None:
        if self._node_of.get(event.task_id) != event.node_id:
            return
        del self._node_of[event.task_id]
        self._training.pop(event.task_id, None)
        if event.task_id in self._microbatches:
            self._microbatches.discard(event.task_id)
            second.trained += event.ok
            if event.loss is not None:
                second.num_losses += 1
                second.sum_losses += event.loss
            return
        request = self._requests.pop(event.task_id, None)
        if request is None:
            return
        # A first token whose trace was dropped came at the end at the latest.
        first_s = min(request.first_token_s, now_s)
        kept = event.ok and first_s <= request.due_s
        kept &= event.output_tokens < 2 or now_s - first_s <= request.tpot_s * (event.output_tokens - 1)
        second.kept += kept
        second.missed += not kept

    def _commanded(self, command: Command, second: _Second) -> None:
        match command:
            case Assign(task_id, node_id):
                self._placed(task_id, node_id)
                if task_id in self._microbatches:
                    self._held_id = ""
            case Defer(task_id, reason):
                if task_id in self._microbatches:
                    self._held_id = task_id if reason == HELD_BACK else ""
            case Reject(task_id, retry_after_s=retry_after_s):
                self._forget(task_id)
                # A request that no node could ever run says nothing about the cluster.
                second.missed += self._requests.pop(task_id, None) is not None and retry_after_s is not None
            case Drop(task_id) | CancelOnNode(task_id):
                self._requests.pop(task_id, None)
                if isinstance(command, Drop):
                    self._forget(task_id)
            case _:
                pass

    def _placed(self, task_id: str, node_id: str) -> None:
        self._node_of[task_id] = node_id
        if task_id in self._microbatches:
            self._training[task_id] = node_id

    def _forget(self, task_id: str) -> None:
        self._node_of.pop(task_id, None)
        self._microbatches.discard(task_id)
        self._training.pop(task_id, None)
        if self._held_id == task_id:
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
        overdue = sum(r.due_s < min(now_s, r.first_token_s) for r in self._requests.values())
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
