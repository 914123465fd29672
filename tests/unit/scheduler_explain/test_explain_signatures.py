"""Failure signatures from hand-made steps: what counts, what does not, when they end."""

import pytest

from services.latency import NodeLatency, OpKind
from services.scheduler.core.commands import Assign, CancelOnNode, Command, Defer, Drop, Reject
from services.scheduler.core.events import (
    Event,
    NodeJoined,
    NodeLost,
    OpFinished,
    TaskArrived,
    TaskEnded,
    TaskRecovered,
    Tick,
)
from services.scheduler.core.node_spec import NodeSpec
from services.scheduler.core.tasks import InferenceTask, SloTarget, TrainingTask
from services.scheduler.explain.live import LiveTasks
from services.scheduler.explain.signatures import Change, Finding, Signature, Signatures

SLO = SloTarget(ttft_s=1.0, tpot_s=0.1)


class Watch:
    """Signatures and what they said."""

    def __init__(self) -> None:
        self.tasks = LiveTasks()
        self.signatures = Signatures(self.tasks, SLO)
        self.changes: list[Change] = []
        self.num_tasks = 0

    def step(self, now_s: float, event: Event, *commands: Command) -> None:
        self.changes += self.signatures.advance(now_s)
        self.tasks.add(now_s, event, commands)

    def look(self, now_s: float) -> list[Signature]:
        """What is wrong at a time."""
        self.step(now_s, Tick())
        return [finding.signature for finding in self.signatures.active]

    def finding(self, now_s: float) -> Finding:
        self.look(now_s)
        (finding,) = self.signatures.active
        return finding

    def request(
        self, now_s: float, *, first_s: float, end_s: float, tokens: int = 2, ok: bool = True, slo: SloTarget = SLO
    ) -> None:
        """A request from its arrival to its end."""
        self.num_tasks += 1
        task_id = f"r{self.num_tasks}"
        self.step(now_s, TaskArrived(InferenceTask(task_id, now_s, 10, 64, slo)), Assign(task_id, "n"))
        self.step(first_s, OpFinished("n", 0, OpKind.PREFILL, now_s, first_s, (task_id,), first_token=True))
        self.step(end_s, TaskEnded(task_id, "n", ok, tokens))

    def microbatch(self, now_s: float, *commands: Command, task_id: str = "m") -> None:
        self.step(now_s, TaskArrived(TrainingTask(task_id, now_s, "j", 1, 8)), *commands)

    def trained(self, now_s: float, loss: float) -> None:
        self.num_tasks += 1
        task_id = f"m{self.num_tasks}"
        self.microbatch(now_s, Assign(task_id, "n"), task_id=task_id)
        self.step(now_s, TaskEnded(task_id, "n", ok=True, loss=loss))


@pytest.fixture
def watch() -> Watch:
    return Watch()


def requests(watch: Watch, num: int, *, late: int = 0, **fields: float) -> None:
    for index in range(num):
        at_s = 10.0 + index * 0.1
        first_s = at_s + (0.06 if index >= late else 1.06)
        watch.request(at_s, first_s=first_s, end_s=first_s + 0.01, **fields)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------- slo_collapse


@pytest.mark.parametrize(("num", "late", "collapsed"), [(20, 4, False), (20, 5, True), (19, 19, False)])
def test_collapse_needs_enough_requests_and_enough_misses(num: int, late: int, collapsed: bool, watch: Watch) -> None:
    # Each comes after the end of the one before, so the virtual clock only rises.
    for index in range(num):
        at_s = 10.0 + index * 1.2
        first_s = at_s + (1.1 if index < late else 0.1)
        watch.request(at_s, first_s=first_s, end_s=first_s)
    assert (Signature.SLO_COLLAPSE in watch.look(36.0)) is collapsed


def test_a_collapse_ends_when_the_misses_have_left_the_window(watch: Watch) -> None:
    requests(watch, 25, late=25)
    begun = watch.finding(14.0)
    assert begun.numbers["attainment"] == 0.0
    assert watch.look(30.0) == [Signature.SLO_COLLAPSE]
    for index in range(30):
        watch.request(60.0 + index * 0.1, first_s=60.05 + index * 0.1, end_s=60.06 + index * 0.1)
    assert watch.look(64.0) == []
    assert [(change.finding.since_s, change.active) for change in watch.changes] == [
        (begun.since_s, True),
        (begun.since_s, False),
    ]
    assert watch.changes[-1].finding.numbers["attainment"] == 1.0


def test_late_further_tokens_and_failures_are_misses(watch: Watch) -> None:
    for index in range(10):
        watch.request(10.0 + index, first_s=10.1 + index, end_s=10.5 + index, tokens=4)
    for index in range(10):
        watch.request(20.0 + index, first_s=20.1 + index, end_s=20.1 + index, ok=False)
    assert watch.finding(30.5).numbers["attainment"] == 0.0


def test_requests_that_have_no_first_token_when_it_is_due_are_misses(watch: Watch) -> None:
    for index in range(30):
        watch.step(10.0, TaskArrived(InferenceTask(f"r{index}", 10.0, 10, 64)), Assign(f"r{index}", "n"))
    assert watch.look(11.0) == []
    assert watch.finding(12.0).numbers["overdue"] == 30


def test_a_first_token_in_time_is_no_miss_while_the_request_runs(watch: Watch) -> None:
    for index in range(30):
        task_id = f"r{index}"
        watch.step(10.0, TaskArrived(InferenceTask(task_id, 10.0, 10, 64)), Assign(task_id, "n"))
        watch.step(10.5, OpFinished("n", 0, OpKind.PREFILL, 10.0, 10.5, (task_id,), first_token=True))
    assert watch.look(40.0) == []


@pytest.mark.parametrize(("retry_after_s", "collapsed"), [(1.0, True), (None, False)])
def test_refusals_for_now_are_misses_and_impossible_requests_are_not(
    retry_after_s: float | None, collapsed: bool, watch: Watch
) -> None:
    for index in range(30):
        refusal = Reject(f"r{index}", "OVERLOADED", "", retry_after_s)
        watch.step(10.0, TaskArrived(InferenceTask(f"r{index}", 10.0, 10, 64)), refusal)
    assert (watch.look(12.0) == [Signature.SLO_COLLAPSE]) is collapsed
    assert len(watch.tasks) == 0


@pytest.mark.parametrize("command", [Drop("r"), CancelOnNode("r", "n")])
def test_what_its_client_cancelled_is_no_miss(command: Command, watch: Watch) -> None:
    for index in range(30):
        watch.step(10.0, TaskArrived(InferenceTask("r", 10.0, 10, 64)), Assign("r", "n"))
        watch.step(10.0, Tick(), command)
        watch.step(15.0 + index, TaskEnded("r", "n", ok=False))
    assert watch.look(46.0) == []


def test_requests_without_any_promise_break_none() -> None:
    watch = Watch()
    watch.tasks = LiveTasks()
    watch.signatures = Signatures(watch.tasks, SloTarget())
    for index in range(30):
        watch.request(10.0 + index, first_s=10.9 + index, end_s=10.9 + index, slo=SloTarget())
    assert watch.look(41.0) == []


@pytest.mark.parametrize(("training_s", "advice"), [(0.0, "not in the way"), (5.0, "is in the way")])
def test_the_advice_tells_whether_training_is_in_the_way(training_s: float, advice: str, watch: Watch) -> None:
    watch.step(9.9, OpFinished("n", 0, OpKind.TRAIN_FORWARD, 9.9 - training_s, 9.9, ("m",)))
    requests(watch, 25, late=25)
    assert advice in watch.finding(14.0).advice


# ----------------------------------------------------------------------------- memory_exhausted


def test_memory_failures_are_named_with_the_node_until_they_leave_the_window(watch: Watch) -> None:
    watch.look(1.0)
    for node_id in ("a", "b", "b"):
        assert watch.look(5.0) == []
        watch.signatures.memory_failed(5.0, node_id)
    finding = watch.finding(6.0)
    assert finding.signature is Signature.MEMORY_EXHAUSTED
    assert finding.numbers["memory_failures"] == 3
    assert "on b" in finding.advice
    assert (finding.numbers["offloads"], finding.numbers["moving_share"]) == (0, 0.0)
    assert watch.look(34.0) == [Signature.MEMORY_EXHAUSTED]
    assert watch.look(36.0) == []


def test_moves_to_host_memory_are_told_and_are_no_serving(watch: Watch) -> None:
    for kind, seconds in ((OpKind.OFFLOAD, 0.3), (OpKind.RELOAD, 0.2), (OpKind.OFFLOAD, 0.1), (OpKind.DECODE, 1.4)):
        watch.step(5.0, OpFinished("a", 0, kind, 5.0 - seconds, 5.0, ("r",)))
    for _ in range(3):
        watch.signatures.memory_failed(5.0, "a")
    numbers = watch.finding(6.0).numbers
    assert numbers["offloads"] == 2
    assert numbers["moving_share"] == pytest.approx(0.6 / 2.0)


# ----------------------------------------------------------------------------- training_starved


def test_starved_when_held_back_for_half_of_the_window(watch: Watch) -> None:
    watch.microbatch(100.0, Defer("m", "held_back"))
    for second in range(101, 115):
        assert watch.look(float(second)) == []
    finding = watch.finding(115.5)
    assert finding.signature is Signature.TRAINING_STARVED
    assert finding.numbers["held_share"] == pytest.approx(15.5 / 30.0)
    watch.step(116.0, Tick(), Assign("m", "n"))
    assert watch.look(140.0) == []


def test_waiting_for_another_reason_is_not_starving(watch: Watch) -> None:
    watch.microbatch(100.0, Defer("m", "held_back"))
    watch.step(105.0, Tick(), Defer("m", "inflight_limit"))
    assert watch.look(150.0) == []


@pytest.mark.parametrize("command", [Drop("m"), Reject("m", "OVERLOADED", "", 1.0), Assign("m", "n")])
def test_hold_back_ends_with_what_is_held_back(command: Command, watch: Watch) -> None:
    watch.microbatch(100.0, Defer("m", "held_back"))
    watch.step(105.0, Tick(), command)
    assert watch.look(150.0) == []


def test_hold_back_while_training_runs_is_not_starving(watch: Watch) -> None:
    watch.microbatch(100.0, Assign("m", "n"))
    watch.microbatch(100.0, Defer("next", "held_back"), task_id="next")
    assert watch.look(150.0) == []
    # Through its backward it waits for the rest of its group, which is held back.
    watch.step(150.0, OpFinished("n", 0, OpKind.TRAIN_BACKWARD, 149.0, 150.0, ("m",), part=0, parts=2))
    assert watch.look(170.0) == []
    watch.step(170.0, OpFinished("n", 0, OpKind.TRAIN_BACKWARD, 169.0, 170.0, ("m",), part=1, parts=2))
    assert watch.look(190.0) == [Signature.TRAINING_STARVED]


def test_training_of_a_lost_node_does_not_run(watch: Watch) -> None:
    watch.step(98.0, NodeJoined(NodeSpec("n", 1, NodeLatency(()))))
    watch.step(99.0, TaskRecovered(TrainingTask("m", 99.0, "j", 1, 8), "n"))
    watch.microbatch(100.0, Defer("next", "held_back"), task_id="next")
    assert watch.look(150.0) == []
    watch.step(150.0, NodeLost("n"))
    assert watch.look(170.0) == [Signature.TRAINING_STARVED]


@pytest.mark.parametrize(("fall", "starved"), [(0.0, True), (0.005, True), (0.02, False), (-0.1, True)])
def test_a_falling_loss_is_not_starving(fall: float, starved: bool, watch: Watch) -> None:
    watch.microbatch(70.0, task_id="held")
    for index in range(46):
        at_s = 70.5 + index
        watch.trained(at_s, 2.0 if at_s < 100.0 else 2.0 * (1.0 - fall))
        if at_s > 99.0:
            watch.step(at_s, Tick(), Defer("held", "held_back"))
    assert (watch.look(116.0) == [Signature.TRAINING_STARVED]) is starved
    assert watch.changes == [] or watch.finding(116.0).numbers["loss_change"] == pytest.approx(-fall)


# ----------------------------------------------------------------------------- bounds


def test_the_report_of_a_lost_node_keeps_no_promise(watch: Watch) -> None:
    """The core ignores it as well: the request waits again."""
    watch.step(9.0, NodeJoined(NodeSpec("n", 1, NodeLatency(()))))
    for index in range(20):
        watch.step(10.0, TaskArrived(InferenceTask(f"r{index}", 10.0, 10, 64)), Assign(f"r{index}", "n"))
    watch.step(10.1, NodeLost("n"))
    for index in range(20):
        watch.step(10.2, TaskEnded(f"r{index}", "n", ok=True, output_tokens=1))
    assert watch.look(10.5) == []
    assert watch.look(12.0) == [Signature.SLO_COLLAPSE]
    assert watch.changes[-1].finding.numbers["overdue"] == 20


def test_memory_is_bounded_by_the_window_and_live_work(watch: Watch) -> None:
    for index in range(5000):
        watch.request(float(index), first_s=index + 0.1, end_s=index + 0.2)
        watch.trained(index + 0.3, 1.0)
        watch.signatures.memory_failed(index + 0.4, "n")
    signatures = watch.signatures
    assert len(watch.tasks) == 0
    assert len(signatures._seconds) <= 30
    assert len(signatures._memory_failures) <= 31
    assert not signatures._training


def test_a_clock_that_falls_counts_no_negative_time(watch: Watch) -> None:
    watch.microbatch(100.0, Defer("m", "held_back"))
    watch.step(90.0, Tick())
    assert watch.look(150.0) == [Signature.TRAINING_STARVED]
    assert watch.changes[-1].finding.numbers["held_share"] == 1.0
