"""A virtual clock that runs a node core's ops with given durations, and checks what it does."""

import heapq
from collections import Counter
from collections.abc import Callable

from services.latency import OpKind
from services.node_agent.core.node import NodeCore
from services.node_agent.core.types import (
    Command,
    Event,
    InferenceRequest,
    MicrobatchArrived,
    NodeCoreConfig,
    Op,
    OpDone,
    RequestArrived,
    RunOp,
    SyncRequested,
    TaskDone,
    Tick,
    TrainingMicrobatch,
)
from tests.unit.node_core.checker import Checker, with_new_tokens

SHORT = {
    OpKind.PREFILL: "P",
    OpKind.DECODE: "D",
    OpKind.TRAIN_FORWARD: "F",
    OpKind.TRAIN_BACKWARD: "B",
    OpKind.OPTIMIZER_STEP: "S",
    OpKind.WEIGHT_SYNC: "W",
    OpKind.OFFLOAD: "o",
    OpKind.RELOAD: "r",
}
DURATIONS = {
    OpKind.PREFILL: 0.1,
    OpKind.DECODE: 0.05,
    OpKind.TRAIN_FORWARD: 0.2,
    OpKind.TRAIN_BACKWARD: 0.4,
    OpKind.OPTIMIZER_STEP: 0.1,
    OpKind.WEIGHT_SYNC: 0.02,
    OpKind.OFFLOAD: 0.03,
    OpKind.RELOAD: 0.03,
}


class Driver:
    """Runs a core to its end on a virtual clock."""

    def __init__(
        self,
        *,
        durations: dict[OpKind, float] | Callable[[int, Op], float] = DURATIONS,
        stop_after: dict[str, int] | None = None,
        fail: Callable[[int, Op], bool] = lambda stage, op: False,
        core: NodeCore | None = None,
        **config: object,
    ) -> None:
        self.config = core.config if core else NodeCoreConfig(**config)  # type: ignore[arg-type]
        self.core = core or NodeCore(self.config)
        self.checker = Checker(self.config)
        self.now_s = 0.0
        self.runs: list[tuple[float, int, Op]] = []
        self.log: list[str] = []
        self.results: dict[str, str] = {}
        self.details: dict[str, str] = {}
        self.ended_s: dict[str, float] = {}
        self._durations = durations
        self._stop_after = stop_after or {}
        self._tokens: Counter[str] = Counter()
        self._fail = fail
        self._events: list[tuple[float, int, Event]] = []
        self._serial = 0

    def at(self, time_s: float, *events: Event) -> "Driver":
        """Schedule events."""
        for event in events:
            self._serial += 1
            heapq.heappush(self._events, (time_s, self._serial, event))
        return self

    def run(self, until_s: float = 1e6, max_events: int = 20_000) -> "Driver":
        """Deliver events, and the ends of ops, until nothing is left."""
        for _ in range(max_events):
            wakeup_s = self.core.next_wakeup_s
            if wakeup_s is not None and (not self._events or self._events[0][0] > wakeup_s):
                self.at(max(wakeup_s, self.now_s), Tick())
            if not self._events or self._events[0][0] > until_s:
                return self
            self.now_s, _, event = heapq.heappop(self._events)
            self.give(event)
        raise AssertionError("the core does not come to an end")

    def give(self, event: Event) -> list[Command]:
        """Give one event now."""
        self.checker.before(event)
        commands = self.core.step(self.now_s, event)
        self.checker.after(commands)
        for command in commands:
            self._note(command)
        return commands

    def _note(self, command: Command) -> None:
        if isinstance(command, RunOp):
            stage, op = command.stage, command.op
            self.runs.append((self.now_s, stage, op))
            name = ",".join(op.task_ids) or op.subject
            self.log.append(f"{self.now_s:7.3f} stage {stage}  {SHORT[op.kind]} v{op.version} {name}")
            self.at(round(self.now_s + self._duration_s(stage, op), 9), self._end(stage, op))
        elif isinstance(command, TaskDone):
            self.results[command.task_id] = command.reason
            self.details[command.task_id] = command.detail
            self.ended_s[command.task_id] = self.now_s
            self.log.append(f"{self.now_s:7.3f} done     {command.task_id} {command.reason}")

    def _duration_s(self, stage: int, op: Op) -> float:
        return self._durations(stage, op) if callable(self._durations) else self._durations[op.kind]

    def _end(self, stage: int, op: Op) -> OpDone:
        stopped: tuple[str, ...] = ()
        if op.kind in (OpKind.PREFILL, OpKind.DECODE) and stage == self.config.num_stages - 1:
            self._tokens.update(with_new_tokens(op))
            stopped = tuple(i for i in op.task_ids if self._tokens[i] == self._stop_after.get(i))
        return OpDone(stage, op.op_id, stopped, self._fail(stage, op))

    # ------------------------------------------------------------- reading the transcript

    def order(self, stage: int = 0) -> str:
        """Ops a stage ran, in order, as letters."""
        return "".join(SHORT[op.kind] for _, where, op in self.runs if where == stage)

    def ops(self, kind: OpKind, stage: int = 0) -> list[tuple[float, Op]]:
        """Start times and ops of one kind on one stage."""
        return [(time_s, op) for time_s, where, op in self.runs if where == stage and op.kind is kind]


def request(
    task_id: str, prompt: int = 10, max_tokens: int = 1, arrival_s: float = 0.0, **more: float | str
) -> RequestArrived:
    """A request arrives."""
    return RequestArrived(InferenceRequest(task_id, arrival_s, prompt, max_tokens, **more))  # type: ignore[arg-type]


def microbatch(
    task_id: str, job: str = "job", accumulation: int = 1, last: bool = False, parts: int = 1
) -> MicrobatchArrived:
    """A micro-batch named "<name><sequence>" arrives: 2 examples of 8 tokens."""
    sequence = int("".join(c for c in task_id if c.isdigit()) or 0)
    return MicrobatchArrived(TrainingMicrobatch(task_id, 0.0, job, sequence, 2, 8, accumulation, last, parts))


def sync(sync_id: str, changes_weights: bool, settles: bool = False) -> SyncRequested:
    """A synchronisation is asked for."""
    return SyncRequested(sync_id, changes_weights, settles)
