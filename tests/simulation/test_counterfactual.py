"""A recording played again: the recorded policy gives what was recorded, another one what it would have given."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from services.node_agent.core.types import NodeCoreConfig
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.policies import POLICIES
from services.scheduler.core.tasks import SloTarget
from services.scheduler.event_log import EventLog
from services.scheduler.explain.counterfactual import Comparison, compare
from services.scheduler.explain.log_file import read_log
from services.scheduler.explain.recording import Recording, recordings
from services.simulator.cluster import Simulation
from services.simulator.metrics import held_node_s
from services.simulator.types import Microbatch, Request, SimulationConfig, SimulationResult, VirtualNode, Work
from tests.simulation.harness import latency, requests
from tests.simulation.recorded import simulate

SLO = SloTarget(ttft_s=0.3, tpot_s=0.03)


def nodes(count: int = 2, **lives: float) -> list[VirtualNode]:
    core = NodeCoreConfig(num_stages=1, max_batch=4)
    made = [VirtualNode(node_id=f"n{index}", latency=latency(), core=core) for index in range(count)]
    return [replace(made[0], **lives), *made[1:]]  # type: ignore[arg-type]


def work(num_requests: int = 40, num_microbatches: int = 20, *, accumulation: int = 2) -> list[Work]:
    made: list[Work] = [
        Request(task.task_id, task.arrival_s, task.prompt_tokens, 1 + index % 30, 64, SLO)
        for index, task in enumerate(requests(num_requests, 20.0, seed=1))
    ]
    return made + [Microbatch(f"m{index}", 0.0, "job", 1, 128, accumulation) for index in range(num_microbatches)]


class Recorder:
    """Simulates with an event log and reads it back."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self._monkeypatch = monkeypatch

    def run(
        self, policy: str, cluster: list[VirtualNode], tasks: list[Work], **config: float
    ) -> tuple[SimulationResult, Recording]:
        core = CoreConfig(policy=policy, default_slo=SLO, hold_s=1.0)
        simulation = SimulationConfig(core=core, **config)  # type: ignore[arg-type]
        result = simulate(self.path, simulation, cluster, tasks, self._monkeypatch)
        (recording,) = recordings(read_log(self.path))
        return result, recording


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(tmp_path / "log", monkeypatch)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_recorded_policy_gives_what_was_recorded(policy: str, recorder: Recorder) -> None:
    """Without noise and delays a simulated run is its own counterfactual, bit for bit."""
    _, recording = recorder.run(policy, nodes(), work())
    comparison = compare(recording, policy, {})
    assert comparison.counterfactual == comparison.recorded_simulated == replace(comparison.recorded, simulated=True)
    assert not comparison.recorded.simulated
    assert (comparison.num_left_out, comparison.num_assumed) == (0, 0)


def test_the_figures_are_those_of_the_run(recorder: Recorder) -> None:
    result, recording = recorder.run("lemix", nodes(), work())
    figures = compare(recording, "lemix", {}).recorded
    responses = [record.response_s for record in result.requests()]
    held_s = held_node_s(result, 1.0)
    assert (figures.num_requests, figures.num_requests_ok, figures.num_microbatches_ok) == (40, 40, 20)
    assert figures.mean_response_s == pytest.approx(sum(responses) / 40)
    assert figures.held_node_s == pytest.approx(held_s)
    assert figures.tasks_per_held_node_s == pytest.approx(60 / held_s)
    assert figures.last_end_s == pytest.approx(max(record.ended_s or 0.0 for record in result.tasks.values()))
    kept = [
        record
        for record in result.requests()
        if isinstance(record.work, Request)
        and record.first_token_s is not None
        and record.ended_s is not None
        and record.first_token_s - record.work.arrival_s <= 0.3
        and record.ended_s - record.first_token_s <= 0.03 * (record.work.output_tokens - 1) + 1e-12
    ]
    assert figures.slo_attainment == len(kept) / 40


def test_another_policy_gives_what_it_would_have_given(recorder: Recorder) -> None:
    tasks = work()
    _, recording = recorder.run("round_robin", nodes(), tasks)
    comparison = compare(recording, "separate", {})
    core = CoreConfig(policy="separate", default_slo=SLO, hold_s=1.0)
    direct = Simulation(SimulationConfig(core=core), nodes(), tasks).run()
    assert comparison.counterfactual.policy == "separate"
    assert comparison.counterfactual.held_node_s == pytest.approx(held_node_s(direct, 1.0))
    assert comparison.counterfactual.mean_response_s == pytest.approx(
        sum(record.response_s for record in direct.requests()) / 40
    )
    assert comparison.counterfactual != comparison.recorded_simulated


def test_options_are_those_of_the_other_policy_or_add_to_the_recorded(recorder: Recorder) -> None:
    _, recording = recorder.run("lemix", nodes(), work(10, 0))
    recording.config = replace(recording.config, policy_options={"slo_units": 4.0})

    def label(policy: str, **options: float) -> str:
        return compare(recording, policy, options).counterfactual.policy

    assert label("lemix", slo_fraction=0.2) == "lemix slo_units=4.0 slo_fraction=0.2"
    assert label("separate", serving_share=0.5) == "separate serving_share=0.5"
    with pytest.raises(ValueError, match="policy 'separate' has no option 'magic'"):
        label("separate", magic=1.0)


def test_a_job_is_there_from_its_start(recorder: Recorder) -> None:
    """A recording that offered slowly, because its policy trained slowly, does not slow the counterfactual."""
    tasks = [
        replace(task, arrival_s=0.5 * index) if isinstance(task, Microbatch) else task
        for index, task in enumerate(work(1, 10, accumulation=1))
    ]
    _, recording = recorder.run("round_robin", nodes(), tasks)
    comparison = compare(recording, "round_robin", {})
    assert comparison.recorded.last_end_s > 5.0
    assert comparison.counterfactual.last_end_s < 2.0
    assert comparison.counterfactual.num_microbatches_ok == 10


@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_micro_batches_per_step_are_taken_from_the_recording(accumulation: int, recorder: Recorder) -> None:
    _, recording = recorder.run("separate", nodes(2), work(5, 20, accumulation=accumulation))
    assert recording.accumulation == accumulation


def test_a_node_that_was_lost_is_lost_again(recorder: Recorder) -> None:
    _, recording = recorder.run("round_robin", nodes(lost_s=0.7), work(60, 0))
    assert [(life.spec.node_id, life.lost_s) for life in recording.nodes] == [("n0", 0.7), ("n1", math.inf)]
    comparison = compare(recording, "round_robin", {})
    assert comparison.recorded_simulated.num_requests_ok == 60
    assert comparison.recorded_simulated.mean_response_s == pytest.approx(comparison.recorded.mean_response_s)


def test_how_a_cluster_is_stopped_says_nothing_about_its_policy(recorder: Recorder) -> None:
    """Nodes that leave after the last request stay in the counterfactual."""
    _, recording = recorder.run("round_robin", nodes(lost_s=4.0), work(40, 300))
    assert "NodeLost" in recorder.path.read_text("utf-8")
    assert {life.lost_s for life in recording.nodes} == {math.inf}


def test_what_did_not_end_is_left_out_and_told(recorder: Recorder) -> None:
    _, recording = recorder.run("round_robin", nodes(), work(40, 300), horizon_s=1.0)
    comparison = compare(recording, "lemix", {})
    columns = (comparison.recorded, comparison.recorded_simulated, comparison.counterfactual)
    assert len({figures.num_requests for figures in columns}) == 1
    assert {figures.num_requests_ok for figures in columns} == {comparison.recorded.num_requests}
    assert {figures.num_microbatches_ok for figures in columns} == {comparison.recorded.num_microbatches_ok}
    played = comparison.recorded.num_requests + comparison.recorded.num_microbatches_ok
    assert played > 0
    assert comparison.num_left_out == len(recording.tasks) - played > 0


def test_a_refused_request_is_a_miss_that_another_policy_may_serve(recorder: Recorder) -> None:
    """One serving node of two takes only one request at a time; both together take two."""
    cluster = [replace(node, max_inflight_inference=1) for node in nodes()]
    tasks: list[Work] = [Request(f"r{index}", 0.1, 100, 10, 64, SLO) for index in range(3)]
    core = CoreConfig(policy="separate", default_slo=SLO, max_waiting_inference=1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        simulate(recorder.path, SimulationConfig(core=core), cluster, tasks, monkeypatch)
    (recording,) = recordings(read_log(recorder.path))
    comparison = compare(recording, "round_robin", {})
    assert (comparison.recorded.num_requests, comparison.recorded.num_requests_ok) == (3, 2)
    assert comparison.recorded.slo_attainment <= 2 / 3
    assert comparison.counterfactual.num_requests_ok == 3
    assert comparison.num_assumed == 1


def test_a_run_without_any_task_has_no_figures(tmp_path: Path) -> None:
    EventLog(tmp_path / "log", CoreConfig(policy="lemix")).close()
    (recording,) = recordings(read_log(tmp_path / "log"))
    comparison: Comparison = compare(recording, "separate", {})
    assert comparison.counterfactual.num_requests == 0
    assert math.isnan(comparison.counterfactual.slo_attainment)
    assert math.isnan(comparison.recorded.tasks_per_held_node_s)
