"""What a simulation writes down while it runs: what became of every task, node and stage."""

import math
from itertools import repeat

from services.node_agent.core.types import MemoryCounters, Op
from services.scheduler.core.commands import Assign
from services.simulator.types import (
    Decision,
    OpRecord,
    SimulationResult,
    StageUse,
    Stay,
    TaskRecord,
    Work,
)


class Journal:
    """Records of one run. Times in simulation seconds."""

    __slots__ = ("_all_stays", "_decisions", "_keep_ops", "_num_ops", "_open", "_ops", "_stages", "_stays", "tasks")

    def __init__(self, *, keep_ops: bool) -> None:
        self.tasks: dict[str, TaskRecord] = {}
        #: Tasks that the run goes on for.
        self._open: set[str] = set()
        self._stages: dict[tuple[str, int], StageUse] = {}
        self._decisions: list[Decision] = []
        #: Open stay by task, and all of them.
        self._stays: dict[str, Stay] = {}
        self._all_stays: list[Stay] = []
        self._keep_ops = keep_ops
        self._ops: list[OpRecord] = []
        self._num_ops = 0

    @property
    def num_open(self) -> int:
        """Tasks that have to end and have not."""
        return len(self._open)

    def add(self, work: Work, *, has_to_end: bool) -> None:
        """A task is known from now on. Raises ValueError for a second one of the same id."""
        if work.task_id in self.tasks:
            raise ValueError(f"task {work.task_id} is there twice")
        self.tasks[work.task_id] = TaskRecord(work)
        if has_to_end:
            self._open.add(work.task_id)

    def arrives(self, work: Work) -> None:
        """When a task arrives turned out only now."""
        self.tasks[work.task_id].work = work

    def assigned(self, now_s: float, command: Assign) -> None:
        """The scheduler gave a task to a node."""
        record = self.tasks[command.task_id]
        record.node_id = command.node_id
        record.assigned_s = now_s
        record.assignments += 1
        self._stays[command.task_id] = stay = Stay(command.node_id, command.task_id, now_s)
        self._all_stays.append(stay)
        self._decisions.append(Decision(now_s, command.task_id, command.node_id, command.terms))

    def op_ended(self, node_id: str, stage: int, op: Op, begin_s: float, end_s: float) -> None:
        """An operation ran on a stage."""
        self._num_ops += 1
        use = self._stages.get((node_id, stage))
        if use is None:
            use = self._stages[node_id, stage] = StageUse()
        use.add(op.kind, begin_s, end_s)
        if self._keep_ops:
            self._ops.append(OpRecord(node_id, stage, op.kind, begin_s, end_s, op.task_ids, op.subject))

    def first_tokens(self, now_s: float, op: Op) -> None:
        """A prefill's requests have their first token; of a request that ran twice, the earlier one counts."""
        for task_id, cached_tokens in zip(op.first_ids, op.cached_tokens or repeat(0), strict=False):
            record = self.tasks[task_id]
            if record.first_token_s is None:
                record.first_token_s = now_s
                record.cached_tokens = cached_tokens

    def ended(self, now_s: float, task_id: str, outcome: str) -> TaskRecord:
        """A task ended. Raises RuntimeError when it had ended before."""
        record = self.tasks[task_id]
        if record.outcome:
            raise RuntimeError(f"task {task_id} ended twice: {record.outcome}, then {outcome}")
        record.outcome = outcome
        record.ended_s = now_s
        if task_id in self._stays:
            self._stays[task_id].end_s = now_s
        self._open.discard(task_id)
        return record

    def node_lost(self, now_s: float, node_id: str) -> None:
        """Whatever was on a node is there no longer."""
        for stay in self._stays.values():
            if stay.node_id == node_id and stay.end_s == math.inf:
                stay.end_s = now_s

    def result(self, now_s: float, memory: dict[str, MemoryCounters]) -> SimulationResult:
        """Everything, at the end of the run."""
        return SimulationResult(
            tasks=self.tasks,
            stages=self._stages,
            decisions=self._decisions,
            stays=self._all_stays,
            ended_s=now_s,
            num_ops=self._num_ops,
            ops=self._ops,
            memory=memory,
        )
