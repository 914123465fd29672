"""The scheduler's event log as records: operations, and tasks from their assignment to their end. Pure but for reading.

Times in the log are seconds of the scheduler's monotonic clock, which on one machine is the demo's clock too.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.demo.records import OpRecord, TaskSpan
from services.scheduler.core import codec
from services.scheduler.core.commands import Assign, Command
from services.scheduler.core.events import Event, NodeLost, OpFinished, TaskArrived, TaskEnded
from services.scheduler.core.tasks import TrainingTask


@dataclass(frozen=True, slots=True)
class EventLog:
    """What the scheduler saw and did, in seconds since the start of the traffic."""

    ops: list[OpRecord]
    spans: list[TaskSpan]
    #: (time, loss) of every micro-batch that ended.
    training_loss: list[tuple[float, float]]
    #: (time, node and reason) of every node that was lost.
    lost_nodes: list[tuple[float, str]]
    #: Entries the scheduler could not write: figures from such a log are too small.
    dropped: int


def read_event_log(path: Path, start_s: float) -> EventLog:
    """Parse a log; `start_s` is the start of the traffic on the machine's monotonic clock."""
    reader = _Reader(start_s)
    with path.open(encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line)
            if "event" not in entry:  # the configuration, or a count of entries left out
                reader.dropped += int(entry.get("dropped", 0))
                continue
            commands = [codec.command_from_json(item) for item in entry["commands"]]
            reader.take(float(entry["now_s"]), codec.event_from_json(entry["event"]), commands)
    return reader.result()


class _Reader:
    def __init__(self, start_s: float) -> None:
        self._start_s = start_s
        self._training: set[str] = set()
        self._open: dict[str, TaskSpan] = {}
        self._log = EventLog([], [], [], [], 0)
        self.dropped = 0

    def take(self, now_s: float, event: Event, commands: Iterable[Command]) -> None:
        """One line of the log."""
        at_s = now_s - self._start_s
        match event:
            case TaskArrived(task=TrainingTask(task_id=task_id)):
                self._training.add(task_id)
            case OpFinished():
                self._log.ops.append(
                    OpRecord(
                        event.node_id, event.stage, event.op,
                        event.begin_s - self._start_s, event.end_s - self._start_s, event.num_tokens,
                    )
                )  # fmt: skip
            case TaskEnded():
                self._end(event, at_s)
            case NodeLost():
                self._log.lost_nodes.append((at_s, f"{event.node_id} was lost at {at_s:.1f} s: {event.reason}"))
            case _:
                pass
        for command in commands:
            if isinstance(command, Assign):
                self._assign(command, at_s)

    def _assign(self, command: Assign, at_s: float) -> None:
        earlier = self._open.pop(command.task_id, None)
        if earlier is not None:  # its node was lost
            self._log.spans.append(_ended(earlier, at_s, ok=False))
        training = command.task_id in self._training
        self._open[command.task_id] = TaskSpan(command.task_id, command.node_id, training, at_s, None)

    def _end(self, event: TaskEnded, at_s: float) -> None:
        span = self._open.pop(event.task_id, None)
        if span is None:
            return
        self._log.spans.append(_ended(span, at_s, ok=event.ok))
        if span.training and event.ok and event.loss is not None:
            self._log.training_loss.append((at_s, event.loss))

    def result(self) -> EventLog:
        """Everything so far; tasks that have not ended stay without an end."""
        log = self._log
        return EventLog(log.ops, [*log.spans, *self._open.values()], log.training_loss, log.lost_nodes, self.dropped)


def _ended(span: TaskSpan, at_s: float, *, ok: bool) -> TaskSpan:
    return TaskSpan(span.task_id, span.node_id, span.training, span.assigned_s, at_s, ok)
