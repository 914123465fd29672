"""The three forms of the paper's score: worked examples, inert knobs, deviations of the released code, ablations."""

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.latency import LatencyModel, NodeLatency, OpKind
from services.scheduler.core.commands import Assign, Defer, NodeTerms
from services.scheduler.core.events import OpFinished, TaskArrived, TaskEnded
from services.scheduler.core.forecast import BackwardWindow
from services.scheduler.core.node_spec import NodeSpec
from services.scheduler.core.policies.paper_released import ReleasedForecast, walk
from services.scheduler.core.scheduler import SchedulerCore
from services.scheduler.core.tasks import InferenceTask, TrainingTask
from tests.unit.scheduler_core.support import assigned, constant_latency, core_with, microbatch, node, request

PAPER = ("paper_additive", "paper_ratio", "paper_released")


def decide(core: SchedulerCore, task: InferenceTask | TrainingTask) -> Assign:
    (command,) = core.step(task.arrival_s, TaskArrived(task))
    assert isinstance(command, Assign)
    return command


def place(core: SchedulerCore, now_s: float, task_id: str, prompt: int = 100) -> str:
    return decide(core, request(task_id, arrival_s=now_s, prompt=prompt)).node_id


def example_core(policy: str, **options: float) -> SchedulerCore:
    """Two stages, F = 1, B = 2 on both, one training task released at 0."""
    latency = constant_latency(2, prefill=1.0, train_forward=1.0, train_backward=2.0)
    core = core_with(node("a", 2, latency=latency), policy=policy, policy_options=options)
    core.step(0.0, TaskArrived(microbatch("t")))
    return core


def example_terms(policy: str, release_s: float) -> NodeTerms:
    (terms,) = decide(example_core(policy), request("r", arrival_s=release_s)).terms
    return terms


# ----------------------------------------------------------------------------- worked examples


@pytest.mark.parametrize(("release_s", "idleness_s", "response_s"), [(0.5, 0.0, 4.5), (2.5, 1.5, 2.5)])
@pytest.mark.parametrize("policy", ["paper_additive", "paper_ratio"])
def test_worked_examples(policy: str, release_s: float, idleness_s: float, response_s: float) -> None:
    terms = example_terms(policy, release_s)
    assert (terms.idleness_s, terms.response_s, terms.idleness_profit) == (idleness_s, response_s, -0.2)
    score = -0.2 - 0.15 * response_s if policy == "paper_additive" else -0.2 / (0.15 * response_s)
    assert terms.score == pytest.approx(score)


@pytest.mark.parametrize(("release_s", "idleness_s", "response_s"), [(0.5, 0.0, 3.5), (2.5, 4.0, 3.5)])
def test_worked_examples_by_the_released_code(release_s: float, idleness_s: float, response_s: float) -> None:
    # The training task is taken to run 0-1 on both stages at once, so its backwards are at 1-3 and 3-5.
    terms = example_terms("paper_released", release_s)
    assert (terms.idleness_s, terms.response_s, terms.idleness_profit) == (idleness_s, response_s, -0.2)
    assert terms.score == pytest.approx(-0.2 / (0.15 * response_s))


@pytest.mark.parametrize(("policy", "stages"), [("paper_additive", 3), ("paper_ratio", 3), ("paper_released", 1)])
def test_response_on_an_empty_node_is_one_forward_per_stage_except_in_the_released_code(
    policy: str, stages: int
) -> None:
    core = core_with(node("a", 3, latency=constant_latency(3, prefill=1.0)), policy=policy)
    (terms,) = decide(core, request("r")).terms
    assert terms.response_s == stages * 1.0
    assert terms.idleness_s == 0.0


# ----------------------------------------------------------------------------- inert knobs, known flaws


def stream(policy: str, gaps_s: Sequence[float], **options: float) -> list[Assign]:
    """Decisions about requests of many lengths and some training on three nodes; each ends when it was predicted to."""
    models = {
        OpKind.PREFILL: LatencyModel("quadratic", (1e-5,)),
        OpKind.TRAIN_FORWARD: LatencyModel("quadratic", (1e-5,)),
        OpKind.TRAIN_BACKWARD: LatencyModel("quadratic", (2e-5,)),
    }
    core = core_with(
        *(node(name, 2, latency=NodeLatency((models,) * 2)) for name in "abc"),
        policy=policy,
        policy_options=options,
        max_inflight_training=64,
        max_hold_back_s=0.0,
    )
    now_s = 0.0
    decisions: list[Assign] = []
    live: list[tuple[float, Assign]] = []
    for index, gap_s in enumerate(gaps_s):
        now_s += gap_s
        for end_s, decision in [entry for entry in live if entry[0] <= now_s]:
            core.step(end_s, TaskEnded(decision.task_id, decision.node_id, ok=True, output_tokens=1))
            live.remove((end_s, decision))
        length = 20 + 61 * index % 173
        if index % 4 == 3:
            decision = decide(core, microbatch(f"m{index}", arrival_s=now_s, length=length))
        else:
            decision = decide(core, request(f"r{index}", arrival_s=now_s, prompt=length))
        response_s = next(terms.response_s for terms in decision.terms if terms.node_id == decision.node_id)
        live.append((now_s + response_s, decision))
        decisions.append(decision)
    return decisions


def choices(decisions: Sequence[Assign]) -> list[str]:
    return [decision.node_id for decision in decisions]


@pytest.mark.parametrize("policy", ["paper_ratio", "paper_released"])
@settings(deadline=None, max_examples=30)
@given(lambda_1=st.floats(1e-3, 1e3), gaps_s=st.lists(st.sampled_from([0.0, 0.03, 0.1, 0.5]), max_size=25))
def test_lambda_1_is_inert_in_the_ratio(policy: str, lambda_1: float, gaps_s: list[float]) -> None:
    assert choices(stream(policy, gaps_s, lambda_1=lambda_1)) == choices(stream(policy, gaps_s))


def test_lambda_1_is_not_inert_in_the_sum() -> None:
    gaps_s = [0.05] * 40
    spread = choices(stream("paper_additive", gaps_s))
    assert set(spread) == {"a", "b", "c"}
    assert choices(stream("paper_additive", gaps_s, lambda_1=0.0)) != spread


def _choice_with_tau(policy: str, decision: Assign, tau_s: float) -> str:
    """The node this one decision would have named with a larger tau, whose IP is at most -tau."""

    def score(terms: NodeTerms) -> float:
        value = min(terms.idleness_profit, -tau_s) + 0.05 * terms.length_consistency
        return value - 0.15 * terms.response_s if policy == "paper_additive" else value / terms.response_s

    return max(decision.terms, key=score).node_id


@pytest.mark.parametrize("policy", ["paper_additive", "paper_ratio"])
@pytest.mark.parametrize("gap_s", [0.02, 0.1, 0.4])
def test_tau_is_nearly_inert(policy: str, gap_s: float) -> None:
    gaps_s = [gap_s * factor for factor in (0.2, 1.8, 0.5, 1.5) * 50]
    decisions = stream(policy, gaps_s)
    profits = [terms.idleness_profit for decision in decisions for terms in decision.terms]
    assert profits.count(-0.2) >= 0.9 * len(profits)
    same = sum(decision.node_id == _choice_with_tau(policy, decision, 0.4) for decision in decisions)
    assert same >= 0.9 * len(decisions)


def test_the_ratio_packs_where_the_sum_spreads() -> None:
    gaps_s = [0.02] * 40
    assert len(set(choices(stream("paper_ratio", gaps_s)))) == 1
    assert len(set(choices(stream("paper_additive", gaps_s)))) == 3


def test_a_node_without_a_profile_can_be_scored() -> None:
    core = core_with(node("a", latency=NodeLatency(({},))), policy="paper_ratio")
    assert place(core, 0.0, "r") == "a"


# ----------------------------------------------------------------------------- the released code


def backwards(*windows: tuple[str, float, float]) -> list[BackwardWindow]:
    return [BackwardWindow(*window) for window in windows]


def released(*stages: list[BackwardWindow], last_end_s: float = 1.0) -> ReleasedForecast:
    forecast = ReleasedForecast(len(stages))
    for stage, windows in zip(forecast.stages, stages, strict=True):
        stage.last_end_s = last_end_s
        stage.backwards = windows
    return forecast


def no_time(_stage: int, _window: BackwardWindow) -> float:
    return 0.0


def test_released_skips_on_later_stages_the_training_tasks_it_went_past() -> None:
    forecast = released(backwards(("p", 4, 6), ("q", 10, 12)), backwards(("p", 7, 9), ("q", 20, 22)))
    assert walk(forecast, 3.0, [2.0, 2.0], no_time).forwards == ((6.0, 8.0), (6.0, 8.0))


def test_released_looks_again_at_the_last_training_task_when_it_went_past_all() -> None:
    forecast = released(backwards(("p", 4, 6)), backwards(("p", 7, 9)))
    assert walk(forecast, 3.0, [2.0, 2.0], no_time).forwards == ((6.0, 8.0), (9.0, 11.0))


def test_released_takes_as_work_only_backwards_that_begin_after_the_last_forward() -> None:
    forecast = released(backwards(("p", 0.5, 2), ("q", 3, 4)))
    assert walk(forecast, 5.0, [1.0], lambda _stage, window: window.end_s - window.begin_s).idleness_s == 3.0


def test_released_values_busy_time_with_the_batch_of_the_arriving_task() -> None:
    models = {
        OpKind.PREFILL: LatencyModel("constant", (1.0,)),
        OpKind.TRAIN_FORWARD: LatencyModel("quadratic", (0.0025,)),
        OpKind.TRAIN_BACKWARD: LatencyModel("quadratic", (0.005,)),
    }
    core = core_with(node("a", 2, latency=NodeLatency((models,) * 2)), policy="paper_released")
    decide(core, TrainingTask("t", 0.0, "job", 4, 10))
    # As in the worked example, but the backward of 2 s at batch 4 counts as 0.5 s at the request's batch of 1.
    (terms,) = decide(core, request("r", arrival_s=0.5)).terms
    assert terms.idleness_s == pytest.approx(1.5)


def test_released_length_consistency_is_a_density() -> None:
    core = core_with(node("a"), policy="paper_released")
    consistencies = [
        decide(core, request(f"r{index}", arrival_s=float(index), prompt=prompt)).terms[0].length_consistency
        for index, prompt in enumerate((100, 300, 200))
    ]
    # Mean 200, deviation of the population 100: 1 / (100 * sqrt(2 pi)) at the mean.
    assert consistencies == [0.0, 0.0, pytest.approx(0.00398942, rel=1e-5)]


def test_released_values_training_that_ended_with_its_window() -> None:
    core = example_core("paper_released")
    core.step(4.0, TaskEnded("t", "a", ok=True))
    (terms,) = decide(core, request("r", arrival_s=4.0)).terms
    # Idle since 1 on both stages but for the backwards at 3-4 and 1-3; nothing is in the way.
    assert (terms.idleness_s, terms.response_s) == (3.0, 1.0)


# ----------------------------------------------------------------------------- ablations


@pytest.mark.parametrize("policy", PAPER)
@pytest.mark.parametrize("hold_back", [True, False])
def test_hold_back_can_be_switched_off(policy: str, hold_back: bool) -> None:
    core = core_with(node("a"), policy=policy, policy_options={"hold_back": hold_back}, slo_unit_s=0.03)
    core.step(0.0, TaskArrived(request("r", output=8)))
    # Its own forward of 0.2 s is longer than five units.
    commands = core.step(0.0, TaskArrived(microbatch("m")))
    assert commands == [Defer("m", "held_back")] if hold_back else assigned(commands) == [("m", "a")]


@pytest.mark.parametrize("policy", PAPER)
def test_without_a_profile_every_task_and_node_looks_alike(policy: str) -> None:
    def responses(profile: bool) -> set[float]:
        quick, slow = (LatencyModel("quadratic", (eta,)) for eta in (1e-5, 1e-3))
        nodes = [
            NodeSpec(name, 1, NodeLatency(({OpKind.PREFILL: model, OpKind.TRAIN_FORWARD: model},)))
            for name, model in (("a", slow), ("b", quick))
        ]
        found = set()
        for task in (request("r", prompt=10), request("r", prompt=200, output=32), microbatch("r", length=50)):
            core = core_with(*nodes, policy=policy, policy_options={"profile": profile})
            found |= {terms.response_s for terms in decide(core, task).terms}
        return found

    assert len(responses(profile=True)) > 1
    assert len(responses(profile=False)) == 1


def test_without_a_profile_real_durations_still_teach() -> None:
    core = core_with(node("a"), policy="paper_additive", policy_options={"profile": False})
    for index in range(200):
        now_s = float(index)
        decide(core, request(f"r{index}", arrival_s=now_s))
        core.step(now_s, OpFinished("a", 0, OpKind.PREFILL, now_s, now_s + 0.3, (f"r{index}",), 100))
        core.step(now_s + 0.3, TaskEnded(f"r{index}", "a", ok=True))
    (terms,) = decide(core, request("last", arrival_s=1000.0)).terms
    assert terms.response_s == pytest.approx(0.3, rel=1e-3)


@settings(deadline=None, max_examples=30)
@given(gaps_s=st.lists(st.sampled_from([0.0, 0.1, 1.0]), max_size=20), policy=st.sampled_from(PAPER))
@example(gaps_s=[0.0] * 20, policy="paper_released")
def test_ablations_decide_everything(gaps_s: list[float], policy: str) -> None:
    assert len(stream(policy, gaps_s, hold_back=False, profile=False)) == len(gaps_s)
