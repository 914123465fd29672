"""Errors of predicted responses: of what, over which requests, with and without training on the node."""

import pytest

from services.latency import LatencyModel, NodeLatency, OpKind
from services.scheduler.core.commands import Assign, NodeTerms
from services.scheduler.core.events import NodeJoined, NodeLost, OpFinished, TaskArrived, TaskEnded
from services.scheduler.core.node_spec import NodeSpec
from services.scheduler.core.tasks import InferenceTask, TrainingTask
from services.scheduler.explain.accuracy import Accuracy, Predicted
from services.scheduler.explain.decisions import Decisions
from services.scheduler.explain.live import LiveTasks

LATENCY = NodeLatency(({OpKind.PREFILL: LatencyModel("constant", (0.1,))},))


class Watched:
    """A node "n" of one stage, its tasks, and the accuracy of predictions about them."""

    def __init__(self, policy: str = "lemix") -> None:
        self.tasks = LiveTasks()
        self.accuracy = Accuracy(self.tasks)
        self.decisions = Decisions(self.tasks, policy)
        self.tasks.add(0.0, NodeJoined(NodeSpec("n", 1, LATENCY)), [])

    def place(self, at_s: float, task: InferenceTask | TrainingTask, ttft_s: float = 0.0, tpot_s: float = 0.0) -> None:
        terms = NodeTerms("n", 0.0, ttft_s, 0.0, 0.0, 1.0, tpot_s=tpot_s)
        self.tasks.add(at_s, TaskArrived(task), [Assign(task.task_id, "n", (terms,))])

    def op(self, task_id: str, kind: OpKind, end_s: float, *, first: bool = False) -> None:
        self.tasks.add(end_s, OpFinished("n", 0, kind, end_s - 0.1, end_s, (task_id,), first_token=first), [])

    def end(self, at_s: float, task_id: str, *, ok: bool = True, output: int = 0) -> None:
        self.tasks.add(at_s, TaskEnded(task_id, "n", ok=ok, output_tokens=output), [])

    def serve(self, task_id: str, *, ttft_s: float, tpot_s: float, at_s: float = 0.0) -> None:
        """First token after 0.4 s, the third and last after 1 s."""
        self.place(at_s, InferenceTask(task_id, at_s, 10, 3), ttft_s, tpot_s)
        self.op(task_id, OpKind.PREFILL, at_s + 0.4, first=True)
        self.op(task_id, OpKind.DECODE, at_s + 1.0)
        self.end(at_s + 1.1, task_id, output=3)

    @property
    def errors(self) -> dict[tuple[Predicted, bool], float]:
        return {(error.predicted, error.beside_training): error.error for error in self.accuracy.errors()}


def test_ttft_and_response_are_compared_with_what_happened() -> None:
    watched = Watched()
    watched.serve("r", ttft_s=0.3, tpot_s=0.25)
    assert watched.errors == {
        (Predicted.TTFT, False): pytest.approx(0.25),
        (Predicted.RESPONSE, False): pytest.approx(0.2),  # 0.3 + 2 * 0.25 instead of 1
    }


def test_errors_are_means_over_requests() -> None:
    watched = Watched()
    watched.serve("a", ttft_s=0.4, tpot_s=0.3)
    watched.serve("b", ttft_s=0.8, tpot_s=0.3, at_s=2.0)
    assert watched.errors[Predicted.TTFT, False] == pytest.approx(0.5)
    assert [error.num_seen for error in watched.accuracy.errors()] == [2, 2]


def test_requests_beside_training_are_counted_apart() -> None:
    watched = Watched()
    watched.place(0.0, TrainingTask("m", 0.0, "job", 1, 64))
    watched.serve("beside", ttft_s=0.2, tpot_s=0.1, at_s=1.0)
    watched.end(3.0, "m")
    watched.serve("after", ttft_s=0.4, tpot_s=0.3, at_s=4.0)
    assert watched.errors == {
        (Predicted.TTFT, False): pytest.approx(0.0),
        (Predicted.TTFT, True): pytest.approx(0.5),
        (Predicted.RESPONSE, False): pytest.approx(0.0),
        (Predicted.RESPONSE, True): pytest.approx(0.6),
    }


def test_training_that_comes_later_touches_the_response_only() -> None:
    watched = Watched()
    watched.place(0.0, InferenceTask("r", 0.0, 10, 3), 0.4, 0.3)
    watched.op("r", OpKind.PREFILL, 0.4, first=True)
    watched.place(0.5, TrainingTask("m", 0.5, "job", 1, 64))
    watched.end(0.9, "m")
    watched.op("r", OpKind.DECODE, 1.0)
    watched.end(1.1, "r", output=3)
    assert set(watched.errors) == {(Predicted.TTFT, False), (Predicted.RESPONSE, True)}


@pytest.mark.parametrize("policy", ["round_robin", "separate"])
def test_policies_that_predict_nothing_have_no_errors(policy: str) -> None:
    watched = Watched(policy)
    watched.serve("r", ttft_s=0.3, tpot_s=0.1)
    assert watched.errors == {}


def test_the_forecast_of_the_paper_predicts_the_end() -> None:
    watched = Watched("paper_additive")
    watched.serve("r", ttft_s=0.8, tpot_s=0.0)
    assert watched.errors == {(Predicted.RESPONSE, False): pytest.approx(0.2)}


def test_failed_requests_and_lost_nodes_tell_nothing() -> None:
    watched = Watched()
    watched.place(0.0, InferenceTask("failed", 0.0, 10, 3), 0.3, 0.1)
    watched.op("failed", OpKind.PREFILL, 0.4, first=True)
    watched.end(0.5, "failed", ok=False)
    watched.place(0.0, InferenceTask("lost", 0.0, 10, 3), 0.3, 0.1)
    watched.op("lost", OpKind.PREFILL, 0.4, first=True)
    watched.tasks.add(0.6, NodeLost("n"), [])
    assert watched.errors == {}
