"""One run of an event log as work and nodes: what arrived, who was there, and what became of every task. Pure."""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

from services.latency import OpKind
from services.scheduler.core.commands import CancelOnNode, Drop
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import NodeJoined, NodeLost, OpFinished, SyncIntervalSet, TaskArrived
from services.scheduler.core.node_spec import NodeSpec
from services.scheduler.core.tasks import InferenceTask, Task, TrainingTask
from services.scheduler.explain.decisions import Decisions
from services.scheduler.explain.live import LiveTasks
from services.scheduler.explain.log_file import Entry, RunBegan, Step
from services.scheduler.explain.types import Decision, Fate


@dataclass(slots=True)
class NodeLife:
    """A node from its join to its loss; infinite: it stayed."""

    spec: NodeSpec
    joined_s: float
    lost_s: float = math.inf


@dataclass(slots=True)
class Recording:
    """One run. Times are the recorded ones, seconds."""

    config: CoreConfig
    began_s: float = math.inf
    ended_s: float = -math.inf
    nodes: list[NodeLife] = field(default_factory=list)
    #: Every task that arrived, as it arrived first.
    tasks: dict[str, Task] = field(default_factory=dict)
    #: Decisions about each of them, oldest first.
    decisions: dict[str, list[Decision]] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    num_optimizer_steps: int = 0
    sync_every_steps: int = 0

    def final(self, task_id: str) -> Decision | None:
        """The decision that ended well, else the newest; None: none was made."""
        decisions = self.decisions.get(task_id, [])
        good = [decision for decision in decisions if decision.outcome.fate is Fate.OK]
        return [*decisions, *good][-1] if decisions else None

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step, over all jobs."""
        trained = sum(
            isinstance(decision.task, TrainingTask) and decision.outcome.fate is Fate.OK
            for decisions in self.decisions.values()
            for decision in decisions
        )
        return max(1, round(trained / self.num_optimizer_steps)) if self.num_optimizer_steps else 1


def recordings(entries: Iterable[Entry]) -> list[Recording]:
    """The runs of a log."""
    readers: list[_Reader] = []
    for entry in entries:
        if isinstance(entry, RunBegan):
            readers.append(_Reader(entry.config))
        elif isinstance(entry, Step) and readers:
            readers[-1].take(entry)
    return [reader.result() for reader in readers]


class _Reader:
    def __init__(self, config: CoreConfig) -> None:
        self._recording = Recording(config, sync_every_steps=config.sync_every_steps)
        self._tasks = LiveTasks()
        self._decisions = Decisions(self._tasks, config.policy, sys.maxsize)
        self._present: dict[str, NodeLife] = {}
        self._last_request_s = -math.inf

    def take(self, step: Step) -> None:
        """One step of the run."""
        run = self._recording
        self._tasks.add(step.now_s, step.event, step.commands)
        run.began_s, run.ended_s = min(run.began_s, step.now_s), max(run.ended_s, step.now_s)
        run.cancelled.update(command.task_id for command in step.commands if isinstance(command, Drop | CancelOnNode))
        match step.event:
            case TaskArrived(task):
                run.tasks.setdefault(task.task_id, task)
                if isinstance(task, InferenceTask):
                    self._last_request_s = step.now_s
            case OpFinished(node_id=node_id, stage=stage, op=OpKind.OPTIMIZER_STEP):
                life = self._present.get(node_id)
                run.num_optimizer_steps += life is not None and stage == life.spec.num_stages - 1
            case NodeJoined(spec):
                self._joined(spec, step.now_s)
            case NodeLost(node_id):
                life = self._present.pop(node_id, None)
                if life is not None:
                    life.lost_s = step.now_s
            case SyncIntervalSet(steps):
                run.sync_every_steps = steps
            case _:
                pass

    def _joined(self, spec: NodeSpec, now_s: float) -> None:
        life = self._present.get(spec.node_id)
        if life is not None:
            life.spec = spec
            return
        self._present[spec.node_id] = life = NodeLife(spec, now_s)
        self._recording.nodes.append(life)

    def result(self) -> Recording:
        """The run so far."""
        run = self._recording
        for decision in reversed(self._decisions.newest(sys.maxsize)):
            run.decisions.setdefault(decision.task.task_id, []).append(decision)
        for life in {life.spec.node_id: life for life in run.nodes}.values():
            if life.lost_s > self._last_request_s > -math.inf:
                life.lost_s = math.inf  # how a cluster is stopped says nothing about its policy
        return run
