"""The paper's forecast: when every committed operation begins and ends on every stage of a node (paper sections 4-5).

One exclusive operation per task, stage and direction, first come first served. A window is predicted at assignment and
overwritten by the real trace; what follows it on the stage shifts with it. A stage remembers the forward end of its
last task and the backward windows that end later, so memory and time per decision depend on live work alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(slots=True, eq=False)
class Window:
    """When one operation runs, seconds."""

    begin_s: float
    end_s: float


@dataclass(slots=True, eq=False)
class BackwardWindow:
    """When a backward runs. `ran`: from its real trace, so it shifts no more."""

    task_id: str
    begin_s: float
    end_s: float
    ran: bool = False


class Path(NamedTuple):
    """Prediction of COMPUTE_IDLENESS for one task on one node: II (seconds) and its forward window per stage."""

    idleness_s: float
    forwards: tuple[tuple[float, float], ...]

    @property
    def end_s(self) -> float:
        """Forward end on the last stage."""
        return self.forwards[-1][1]


@dataclass(slots=True, eq=False)
class StageForecast:
    """Committed work of one stage."""

    #: Forwards that have not ended, in order of commitment.
    forwards: dict[str, Window] = field(default_factory=dict)
    #: Backwards that end after the last forward, or whose real end is still to come; by begin.
    backwards: list[BackwardWindow] = field(default_factory=list)
    #: Forward end of the last task, also when it is over. None: nothing ever ran.
    last_end_s: float | None = None
    #: End of the last forward that is over.
    _ended_s: float = -math.inf

    def commit_forward(self, task_id: str, begin_s: float, end_s: float) -> None:
        """Append a task's forward."""
        self.forwards[task_id] = Window(begin_s, end_s)
        self.last_end_s = end_s
        self._prune()

    def commit_backward(self, task_id: str, begin_s: float, end_s: float) -> None:
        """Insert a task's backward at its time."""
        index = len(self.backwards)
        while index and self.backwards[index - 1].begin_s > begin_s:
            index -= 1
        self.backwards.insert(index, BackwardWindow(task_id, begin_s, end_s))

    def backward_of(self, task_id: str) -> BackwardWindow | None:
        """The backward of a task, if it is remembered."""
        return next((window for window in self.backwards if window.task_id == task_id), None)

    def correct_forwards(self, begin_s: float | None, end_s: float, rest_s: Mapping[str, float]) -> None:
        """An operation ended at `end_s` that worked on the tasks of `rest_s` (what each has still to run here).

        begin_s: real begin of their forward, None if it began with an earlier operation. Without a rest the forward is
        over at `end_s`; with one it ends when its rest and that of the tasks before it have run.
        """
        delta_s = 0.0
        before_s = -math.inf
        first: tuple[float, float] | None = None
        over: list[str] = []
        for task_id, window in self.forwards.items():
            rest = rest_s.get(task_id)
            if rest is None:
                window.begin_s += delta_s
                window.end_s += delta_s
            else:
                if begin_s is not None:
                    window.begin_s = begin_s
                new_end_s = end_s if rest <= 0.0 else max(end_s, before_s) + rest
                delta_s = new_end_s - window.end_s
                if first is None:
                    first = (window.end_s, delta_s)
                window.end_s = new_end_s
                if rest <= 0.0:
                    over.append(task_id)
            before_s = max(before_s, window.end_s)
        if first is None:
            return
        for task_id in over:
            del self.forwards[task_id]
            self._ended_s = max(self._ended_s, end_s)
        self._shift_backwards(*first)
        self._find_last_end()

    def correct_backward(self, task_id: str, begin_s: float, end_s: float) -> None:
        """The backward of a task really ran then."""
        window = self.backward_of(task_id)
        if window is None:
            return
        old_end_s = window.end_s
        window.begin_s, window.end_s, window.ran = begin_s, end_s, True
        self.shift(old_end_s, end_s - old_end_s)

    def shift(self, from_s: float, delta_s: float) -> None:
        """Move everything that begins at `from_s` or later and has not run."""
        if delta_s == 0.0:
            return
        for window in self.forwards.values():
            if window.begin_s >= from_s:
                window.begin_s += delta_s
                window.end_s += delta_s
        self._shift_backwards(from_s, delta_s)
        self._find_last_end()

    def remove(self, task_id: str, now_s: float) -> None:
        """A task ended: what it had still to run here will not run, and what follows moves up."""
        window = self.forwards.get(task_id)
        if window is not None:
            began = window.begin_s < now_s
            self._close_gap(task_id, window, now_s)
            del self.forwards[task_id]
            if began:
                self._ended_s = max(self._ended_s, min(window.end_s, now_s))
            self._find_last_end()
        backward = self.backward_of(task_id)
        if backward is not None:
            if backward.begin_s >= now_s:
                self.backwards.remove(backward)
            else:
                backward.end_s = min(backward.end_s, now_s)
                backward.ran = True
            self._prune()

    def _close_gap(self, task_id: str, window: Window, now_s: float) -> None:
        before_s = -math.inf
        found = False
        delta_s = 0.0
        for other_id, other in self.forwards.items():
            if found:
                other.begin_s += delta_s
                other.end_s += delta_s
            elif other_id == task_id:
                found = True
                free_from_s = window.begin_s if window.begin_s >= now_s else max(now_s, before_s)
                delta_s = min(0.0, free_from_s - window.end_s)
            else:
                before_s = max(before_s, other.end_s)

    def _shift_backwards(self, from_s: float, delta_s: float) -> None:
        if delta_s == 0.0 or not self.backwards:
            return
        for window in self.backwards:
            if window.begin_s >= from_s and not window.ran:
                window.begin_s += delta_s
                window.end_s += delta_s
        self.backwards.sort(key=lambda window: window.begin_s)

    def _find_last_end(self) -> None:
        last_s = self._ended_s
        for window in self.forwards.values():
            last_s = max(last_s, window.end_s)
        # Was everything committed withdrawn before it began, it is as if nothing ever ran.
        self.last_end_s = last_s if last_s > -math.inf else None
        self._prune()

    def _prune(self) -> None:
        """Forget backwards before the last forward's end, unless their real end is still to come."""
        last_end_s = self.last_end_s
        if self.backwards:
            self.backwards = [
                window for window in self.backwards if last_end_s is None or window.end_s > last_end_s or not window.ran
            ]


class NodeForecast:
    """Forecast of one node with `num_stages` stages."""

    __slots__ = ("last_release_s", "stages")

    def __init__(self, num_stages: int) -> None:
        self.stages = tuple(StageForecast() for _ in range(num_stages))
        self.last_release_s: float | None = None

    def compute_idleness(self, ready_s: float, forward_s: Sequence[float]) -> Path:
        """COMPUTE_IDLENESS of a task released at `ready_s` with the given forward duration per stage."""
        idleness_s = 0.0
        forwards = []
        for stage, duration_s in zip(self.stages, forward_s, strict=True):
            last_end_s = stage.last_end_s
            if last_end_s is None:
                last_end_s = ready_s
            begin_s = last_end_s if last_end_s > ready_s else ready_s
            end_s = begin_s + duration_s
            busy_s = 0.0
            for window in stage.backwards:
                if window.end_s <= last_end_s:
                    continue
                if end_s <= window.begin_s:
                    break
                if begin_s < window.end_s:
                    begin_s = window.end_s
                    end_s = begin_s + duration_s
                busy_s += window.end_s - (window.begin_s if window.begin_s > last_end_s else last_end_s)
            idle_s = begin_s - last_end_s - busy_s
            if idle_s > 0.0:
                idleness_s += idle_s
            forwards.append((begin_s, end_s))
            ready_s = end_s
        return Path(idleness_s, tuple(forwards))

    def gap_s(self, release_s: float) -> float:
        """Time since the release of the node's last task; 0 on an empty node."""
        return 0.0 if self.last_release_s is None else release_s - self.last_release_s

    def commit(self, task_id: str, release_s: float, path: Path, backward_s: Sequence[float] = ()) -> None:
        """Take a task in. `backward_s`: backward duration per stage of a micro-batch."""
        self.last_release_s = release_s
        for stage, (begin_s, end_s) in zip(self.stages, path.forwards, strict=True):
            stage.commit_forward(task_id, begin_s, end_s)
        at_s = path.end_s
        for index in range(len(backward_s) - 1, -1, -1):
            self.stages[index].commit_backward(task_id, at_s, at_s + backward_s[index])
            at_s += backward_s[index]

    def forward_ran(self, stage: int, begin_s: float, end_s: float, rest_s: Mapping[str, float]) -> None:
        """A forward or prefill of the tasks in `rest_s` really ran on a stage; `rest_s`: what they still need there."""
        self.stages[stage].correct_forwards(begin_s, end_s, rest_s)
        for task_id, rest in rest_s.items():
            if rest <= 0.0:
                self._push_forwards(stage + 1, task_id, end_s)

    def decode_ran(self, stage: int, end_s: float, rest_s: Mapping[str, float]) -> None:
        """A decode iteration of the tasks in `rest_s` ended on a stage."""
        self.stages[stage].correct_forwards(None, end_s, rest_s)

    def backward_ran(self, stage: int, task_id: str, begin_s: float, end_s: float) -> None:
        """A backward really ran on a stage."""
        self.stages[stage].correct_backward(task_id, begin_s, end_s)
        self._push_backwards(stage - 1, task_id, end_s)

    def ended(self, task_id: str, now_s: float) -> None:
        """A task ended, in whatever way."""
        for stage in self.stages:
            stage.remove(task_id, now_s)

    def _push_forwards(self, stage: int, task_id: str, earliest_s: float) -> None:
        """The rest of a task's path cannot begin before the stage before has ended; an earlier end pulls nothing."""
        for index in range(stage, len(self.stages)):
            window = self.stages[index].forwards.get(task_id)
            if window is None or window.begin_s >= earliest_s:
                return
            self.stages[index].shift(window.begin_s, earliest_s - window.begin_s)
            earliest_s = window.end_s
        self._push_backwards(len(self.stages) - 1, task_id, earliest_s)

    def _push_backwards(self, stage: int, task_id: str, earliest_s: float) -> None:
        for index in range(stage, -1, -1):
            window = self.stages[index].backward_of(task_id)
            if window is None or window.ran or window.begin_s >= earliest_s:
                return
            self.stages[index].shift(window.begin_s, earliest_s - window.begin_s)
            earliest_s = window.end_s
