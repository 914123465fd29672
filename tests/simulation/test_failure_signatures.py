"""Each failure signature provoked on fake nodes, named with its numbers, gone when its cause is; and none of them in
good health."""

import pytest

from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import NodeJoined, Tick
from services.scheduler.core.tasks import InferenceTask, SloTarget, TrainingTask
from services.scheduler.explain.live import LiveTasks
from services.scheduler.explain.signatures import Change, Signature, Signatures
from tests.simulation.harness import Simulation, requests, spec

SLO = SloTarget(ttft_s=0.25)


def microbatches(num: int, length: int) -> list[TrainingTask]:
    return [TrainingTask(f"job-{index}", 0.0, "job", 1, length) for index in range(num)]


def burst(rate: float, *, calm_rate: float = 3.0) -> list[InferenceTask]:
    """Calm for 20 s, `rate` requests per second for 30 s, calm again for 30 s."""
    calm = [task for task in requests(400, calm_rate, seed=1) if task.arrival_s < 80.0]
    tasks = [task for task in calm if not 20.0 <= task.arrival_s < 50.0]
    tasks += [task for task in requests(5000, rate, seed=2, start_s=20.0) if task.arrival_s < 50.0]
    return [InferenceTask(f"r{i}", task.arrival_s, task.prompt_tokens, 8, SLO) for i, task in enumerate(tasks)]


def watch(policy: str, tasks: list[InferenceTask], training: list[TrainingTask], **config: float) -> list[Change]:
    """What begins and ends on one node."""
    core = CoreConfig(policy=policy, default_slo=SLO, max_waiting_training=4096, **config)  # type: ignore[arg-type]
    simulation = Simulation(core, {task.task_id: 4 for task in tasks})
    live = LiveTasks()
    signatures = Signatures(live, SLO)
    step = simulation.core.step
    changes: list[Change] = []

    def watched(now_s: float, event: object) -> object:
        commands = step(now_s, event)  # type: ignore[arg-type]
        changes.extend(signatures.advance(now_s))
        live.add(now_s, event, commands)  # type: ignore[arg-type]
        return commands

    simulation.core.step = watched  # type: ignore[method-assign,assignment]
    simulation.at(0.0, NodeJoined(spec("n0")))
    for second in range(140):  # as the driver does while something is wrong
        simulation.at(float(second), Tick())
    simulation.offer(training)
    simulation.offer(tasks)
    simulation.run(until_s=140.0)
    return changes


def test_slo_collapse_under_a_burst_with_training_that_nothing_holds_back() -> None:
    begun, ended = watch("round_robin", burst(12.0), microbatches(120, 1500))
    assert (begun.finding.signature, begun.active) == (Signature.SLO_COLLAPSE, True)
    numbers = begun.finding.numbers
    assert numbers["attainment"] < 0.8
    assert numbers["promises"] >= 20
    assert numbers["training_share"] > 0.5
    assert begun.finding.advice.startswith("training is in the way")
    # It ends with the job.
    assert (ended.finding.signature, ended.active) == (Signature.SLO_COLLAPSE, False)
    assert ended.finding.numbers["attainment"] >= 0.9


@pytest.mark.parametrize(("length", "hold_back_s"), [(128, 5.0), (1500, 200.0)])
def test_the_knobs_that_are_advised_keep_the_promises(length: int, hold_back_s: float) -> None:
    changes = watch("lemix", burst(12.0), microbatches(120, length), max_hold_back_s=hold_back_s)
    assert Signature.SLO_COLLAPSE not in [change.finding.signature for change in changes]


def test_slo_collapse_under_a_burst_without_training_says_that_nodes_are_missing() -> None:
    begun, ended = watch("lemix", burst(120.0), [])
    assert begun.finding.signature is Signature.SLO_COLLAPSE
    assert begun.finding.since_s >= 20.0
    assert begun.finding.numbers["training_share"] == 0.0
    assert begun.finding.numbers["peak_requests_per_s"] > 2 * begun.finding.numbers["requests_per_s"]
    assert begun.finding.advice.startswith("training is not in the way")
    assert (ended.finding.signature, ended.active) == (Signature.SLO_COLLAPSE, False)
    assert ended.finding.since_s == begun.finding.since_s
    assert ended.finding.numbers["attainment"] >= 0.9


def test_training_starved_by_hold_back() -> None:
    # A micro-batch's backward (0.4 s) is longer than the promise, so it is held back while requests arrive.
    begun, ended = watch("lemix", burst(3.0), microbatches(200, 2000), max_hold_back_s=20.0)
    assert begun.finding.signature is Signature.TRAINING_STARVED
    numbers = begun.finding.numbers
    assert 0.5 <= numbers["held_share"] < 0.6
    assert numbers["trained_per_s"] < 0.2
    assert numbers["attainment"] > 0.9
    assert "max_hold_back_s" in begun.finding.advice
    assert begun.finding.since_s < 20.0
    # It ends when no more requests come, which hold-back believes after max_hold_back_s.
    assert (ended.finding.signature, ended.active) == (Signature.TRAINING_STARVED, False)
    assert ended.finding.numbers["trained_per_s"] > numbers["trained_per_s"]


def test_the_knob_that_is_advised_ends_starvation() -> None:
    assert watch("lemix", burst(3.0), microbatches(800, 400), max_hold_back_s=20.0) == []


def test_nothing_is_wrong_in_good_health() -> None:
    assert watch("lemix", burst(6.0), microbatches(2000, 128)) == []
