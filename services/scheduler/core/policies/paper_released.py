"""COMPUTE_IDLENESS and score as the research code released with the paper has them (github.com/pejoule/LeMix)."""

import math
from collections.abc import Callable, Sequence

from services.latency import OpKind
from services.scheduler.core.events import Event, NodeJoined
from services.scheduler.core.forecast import BackwardWindow, NodeForecast, Path
from services.scheduler.core.policies.base import Options
from services.scheduler.core.policies.paper import Asked, PaperRatio
from services.scheduler.core.state import Cluster, NodeState

#: Stage and one of its backward windows -> seconds taken to be work.
BusyTime = Callable[[int, BackwardWindow], float]


class PaperReleased(PaperRatio):
    """`paper_ratio` with what the released code does otherwise than the paper.

    1. The forward end of a stage is not carried to the next: there a task may begin as soon as it began on this one.
       On an empty node R is F, not S * F.
    2. The index of the first unfinished training task is carried across stages: a stage never looks at the backwards of
       training tasks that the stages before went past.
    3. Busy time between forwards is eta * C * l^2 with the length l of the training task but the batch C of the
       *arriving* one, and counts only backwards that begin after the last forward ended.
    4. LC is the density of the normal distribution, per token, with the standard deviation of the population.

    Not reproduced, because they are accidents of its data structures: all tasks of a node share one record per stage
    (a shallow copy), so asking about a task overwrites the windows of those before; a training task that was gone past
    is dropped from the books of every node asked; what follows a corrected window does not shift; hold-back ends for
    good with the last request of the run.
    """

    def __init__(self, options: Options) -> None:
        super().__init__(options, "paper_released")

    def observe(self, now_s: float, event: Event, cluster: Cluster) -> bool:
        """Give a new node this policy's forecast."""
        if isinstance(event, NodeJoined):
            node = cluster.nodes[event.node.node_id]
            if not isinstance(node.forecast, ReleasedForecast):
                node.forecast = ReleasedForecast(node.spec.num_stages)
        return super().observe(now_s, event, cluster)

    def _compute_idleness(
        self, asked: Asked, node: NodeState, forecast: NodeForecast, forward_s: Sequence[float]
    ) -> tuple[float, float]:
        training, stage_s, batch = node.training, node.costs.stage_s, asked.batch

        def busy_s(stage: int, window: BackwardWindow) -> float:
            live = training.get(window.task_id)
            if live is None:
                return window.end_s - window.begin_s
            return stage_s(stage, OpKind.TRAIN_BACKWARD, batch, live.task.length, job_id=live.task.job_id)

        path = walk(forecast, asked.now_s, forward_s, busy_s)
        return path.idleness_s, path.end_s

    def _consistency(self, node: NodeState, length: int) -> float:
        lengths = node.lengths
        std = lengths.std
        if std == 0.0:
            return 0.0
        deviation = std * math.sqrt((lengths.count - 1) / lengths.count)
        z = (length - lengths.mean) / deviation
        return math.exp(-0.5 * z * z) / (deviation * math.sqrt(2.0 * math.pi))


class ReleasedForecast(NodeForecast):
    """The corrected forecast, except that tasks are entered along the released code's path."""

    __slots__ = ()

    def compute_idleness(self, ready_s: float, forward_s: Sequence[float]) -> Path:
        """The path; idleness with the busy time that was predicted for the training tasks themselves."""
        return walk(self, ready_s, forward_s, _duration_s)


def _duration_s(_stage: int, window: BackwardWindow) -> float:
    return window.end_s - window.begin_s


def walk(forecast: NodeForecast, ready_s: float, forward_s: Sequence[float], busy_time: BusyTime) -> Path:
    """The released COMPUTE_IDLENESS of a task released at `ready_s`."""
    idleness_s = 0.0
    begin_s = ready_s
    forwards = []
    passed: list[str] = []
    for index, (stage, duration_s) in enumerate(zip(forecast.stages, forward_s, strict=True)):
        # What is carried from stage to stage is when the task began there, not when it ended.
        last_end_s = begin_s if stage.last_end_s is None else stage.last_end_s
        if last_end_s > begin_s:
            begin_s = last_end_s
        busy_s = 0.0
        went_past = False
        for window in stage.backwards:
            task_id = window.task_id
            if task_id in passed:
                continue
            if begin_s + duration_s <= window.begin_s:
                break
            if window.end_s > begin_s:
                begin_s = window.end_s
            if last_end_s <= window.begin_s:
                busy_s += busy_time(index, window)
            passed.append(task_id)
            went_past = True
        else:
            # Its index stays at the last task when it went past all of them.
            if went_past:
                passed.pop()
        idle_s = begin_s - last_end_s - busy_s
        if idle_s > 0.0:
            idleness_s += idle_s
        forwards.append((begin_s, begin_s + duration_s))
    return Path(idleness_s, tuple(forwards))
