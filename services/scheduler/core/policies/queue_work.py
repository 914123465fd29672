"""A baseline without parameters: number of tasks times predicted work."""

from collections.abc import Sequence

from services.scheduler.core.commands import NodeTerms
from services.scheduler.core.events import Event, NodeJoined, NodeLost, TaskEnded, TaskRecovered
from services.scheduler.core.policies.base import Options
from services.scheduler.core.policies.mixed import Ranked
from services.scheduler.core.state import Cluster, LiveTask, NodeState
from services.scheduler.core.tasks import InferenceTask
from services.scheduler.core.traces import forward_s_per_stage


def work_s(live: LiveTask, node: NodeState, cluster: Cluster) -> float:
    """Predicted work of a task on a node: seconds of its stages, their mean."""
    task = live.task
    if isinstance(task, InferenceTask):
        return sum(forward_s_per_stage(task, node, cluster)) / node.costs.num_stages
    return node.costs.training_work_s(task.batch, task.length, task.job_id)


class _Book:
    """Predicted work of the tasks a node holds."""

    __slots__ = ("total_s", "works")

    def __init__(self) -> None:
        self.works: dict[str, float] = {}
        self.total_s = 0.0

    def add(self, task_id: str, seconds: float) -> None:
        self.works[task_id] = seconds
        self.total_s += seconds

    def remove(self, task_id: str) -> None:
        seconds = self.works.pop(task_id, 0.0)
        # Exactly zero when nothing is left, whatever rounding the sum has gathered.
        self.total_s = self.total_s - seconds if self.works else 0.0


class QueueWork(Ranked):
    """Smallest (live tasks + 1) * (predicted work of the live tasks + own work); a task counts in full until it ends.

    The count keeps many small tasks apart, the work keeps long ones apart, and their product needs no weight.
    """

    def __init__(self, options: Options) -> None:
        super().__init__("queue_work", options)
        self._books: dict[str, _Book] = {}

    def observe(self, now_s: float, event: Event, cluster: Cluster) -> bool:
        """Forget the work of tasks that ended, or whose node is gone."""
        del now_s
        match event:
            case TaskEnded(task_id, node_id):
                if node_id in self._books:
                    self._books[node_id].remove(task_id)
            case TaskRecovered(task):
                live = cluster.tasks.get(task.task_id)
                if live is not None and live.node is not None:
                    self._took(live, live.node, work_s(live, live.node, cluster))
            case NodeJoined(spec):
                if cluster.nodes[spec.node_id].inference and not cluster.nodes[spec.node_id].training:
                    self._books.pop(spec.node_id, None)
            case NodeLost(node_id):
                self._books.pop(node_id, None)
        return False

    def _cheapest(
        self, now_s: float, live: LiveTask, candidates: Sequence[NodeState], cluster: Cluster
    ) -> tuple[NodeState, tuple[NodeTerms, ...]]:
        chosen, terms = super()._cheapest(now_s, live, candidates, cluster)
        self._took(live, chosen, work_s(live, chosen, cluster))
        return chosen, terms

    def _cost(self, now_s: float, live: LiveTask, node: NodeState, cluster: Cluster) -> float:
        del now_s
        book = self._books.get(node.spec.node_id)
        outstanding_s = book.total_s if book is not None else 0.0
        return (len(node.inference) + len(node.training) + 1) * (outstanding_s + work_s(live, node, cluster))

    def _took(self, live: LiveTask, node: NodeState, seconds: float) -> None:
        self._books.setdefault(node.spec.node_id, _Book()).add(live.task.task_id, seconds)
