"""Each policy's roles and choices."""

import pytest

from services.scheduler.core import policies
from services.scheduler.core.commands import Assign, SyncMode
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import NodeJoined, NodeLost, TaskArrived, TaskEnded
from services.scheduler.core.node_spec import NodeRole, QueueOrder
from services.scheduler.core.scheduler import SchedulerCore
from tests.unit.scheduler_core.support import (
    PREFILL_S,
    assigned,
    constant_latency,
    core_with,
    microbatch,
    node,
    request,
)


def roles(core: SchedulerCore) -> dict[str, str]:
    return {status.node_id: status.role.value for status in core.snapshot().nodes}


def place(core: SchedulerCore, now_s: float, task_id: str, **kwargs: object) -> str:
    """Node a request goes to."""
    ((_, node_id),) = assigned(core.step(now_s, TaskArrived(request(task_id, arrival_s=now_s, **kwargs))))  # type: ignore[arg-type]
    return node_id


# ----------------------------------------------------------------------------- registry


@pytest.mark.parametrize(
    ("name", "order", "mode"),
    [
        ("least_loaded", QueueOrder.FIFO, SyncMode.AVERAGE),
        ("least_utilised", QueueOrder.FIFO, SyncMode.AVERAGE),
        ("lemix", QueueOrder.INFERENCE_FIRST, SyncMode.AVERAGE),
        ("paper_additive", QueueOrder.FIFO, SyncMode.AVERAGE),
        ("paper_ratio", QueueOrder.FIFO, SyncMode.AVERAGE),
        ("paper_released", QueueOrder.FIFO, SyncMode.AVERAGE),
        ("queue_work", QueueOrder.FIFO, SyncMode.AVERAGE),
        ("random", QueueOrder.FIFO, SyncMode.AVERAGE),
        ("round_robin", QueueOrder.FIFO, SyncMode.AVERAGE),
        ("separate", QueueOrder.FIFO, SyncMode.REPLACE),
        ("separate_dynamic", QueueOrder.FIFO, SyncMode.REPLACE),
    ],
)
def test_registry_and_declarations(name: str, order: QueueOrder, mode: SyncMode) -> None:
    policy = policies.create(name, {})
    assert (policy.queue_order, policy.sync_mode) == (order, mode)
    assert SchedulerCore(CoreConfig(policy=name)).queue_order is order


def test_registry_is_complete() -> None:
    assert sorted(policies.POLICIES) == [
        "least_loaded",
        "least_utilised",
        "lemix",
        "paper_additive",
        "paper_ratio",
        "paper_released",
        "queue_work",
        "random",
        "round_robin",
        "separate",
        "separate_dynamic",
    ]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nope", {}, "unknown policy 'nope'; known: least_loaded, least_utilised, lemix"),
        ("round_robin", {"k": 1}, "no option 'k'; known: max_nodes"),
        ("round_robin", {"max_nodes": 1.5}, "'max_nodes'.*whole number >= 0"),
        ("random", {"seed": True}, "'seed'.*whole number >= 0"),
        ("random", {"seed": float("inf")}, "'seed'.*whole number >= 0"),
        ("least_utilised", {"window_s": 0}, "'window_s'.*number > 0"),
        ("least_loaded", {"window_s": 1}, "no option 'window_s'; known: max_nodes"),
        ("queue_work", {"seed": 1}, "no option 'seed'; known: max_nodes"),
        ("separate", {"serving_share": 1.1}, "'serving_share'.*at most 1"),
        ("separate_dynamic", {"utilisation": 0}, "'utilisation'.*number > 0"),
        ("separate_dynamic", {"window_s": 0.0}, "'window_s'.*number > 0"),
        ("paper_additive", {"lambda_3": 1.0}, "'lambda_3'; known: hold_back, lambda_1, lambda_2, profile, tau_s"),
        ("paper_additive", {"tau_s": "0.2"}, "'tau_s'.*number >= 0"),
        ("paper_additive", {"hold_back": 0}, "'hold_back'.*true or false"),
        ("paper_ratio", {"lambda_1": 0.0}, "'lambda_1' of policy 'paper_ratio'.*number > 0"),
        ("paper_released", {"lambda_1": 0.0}, "'lambda_1' of policy 'paper_released'.*number > 0"),
        (
            "lemix",
            {"forecast": "oracle"},
            "'forecast' of policy 'lemix' must be one of analytic, fast_forward, got 'oracle'",
        ),
        ("lemix", {"foo": 1}, "no option 'foo'; known: backlog_s, .*forecast"),
        ("lemix", {"slo_fraction": -1}, "'slo_fraction'.*number >= 0"),
    ],
)
def test_bad_configuration_is_named(name: str, options: dict[str, float | int | str | bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SchedulerCore(CoreConfig(policy=name, policy_options=options))


@pytest.mark.parametrize(("name", "value"), [("max_waiting_training", 0), ("max_hold_back_s", -1.0)])
def test_bad_bounds_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        CoreConfig(**{name: value})  # type: ignore[arg-type]


# ----------------------------------------------------------------------------- separate, round robin


def test_separate_splits_by_id_and_again_when_nodes_come_and_go() -> None:
    core = core_with(node("b"), policy="separate")
    assert roles(core) == {"b": "both"}
    core.step(1.0, NodeJoined(node("a")))
    assert roles(core) == {"a": "serve", "b": "train"}
    core.step(1.0, NodeJoined(node("c")))
    assert roles(core) == {"a": "serve", "b": "train", "c": "train"}
    core.step(1.0, NodeJoined(node("d")))
    assert roles(core) == {"a": "serve", "b": "serve", "c": "train", "d": "train"}
    core.step(2.0, NodeLost("a"))
    assert roles(core) == {"b": "serve", "c": "train", "d": "train"}


def test_separate_serves_in_turn_on_serving_nodes_alone() -> None:
    core = core_with(*(node(name) for name in "abcd"), policy="separate")
    assert [place(core, 1.0, f"r{index}") for index in range(4)] == ["a", "b", "a", "b"]


def test_round_robin_goes_in_turn_and_passes_over_full_nodes() -> None:
    core = core_with(node("a"), node("b", max_inflight_inference=1), node("c"), policy="round_robin")
    assert [place(core, 1.0, f"r{index}") for index in range(5)] == ["a", "b", "c", "a", "c"]
    core.step(2.0, TaskEnded("r1", "b", ok=True))
    assert place(core, 2.0, "r5") == "a"
    assert place(core, 2.0, "r6") == "b"


# ----------------------------------------------------------------------------- paper


def paper_core(**options: float) -> SchedulerCore:
    """Two stages, F = 1, B = 2 on both, one training task released at 0 on node "a"."""
    latency = constant_latency(2, prefill=1.0, train_forward=1.0, train_backward=2.0)
    core = core_with(node("a", 2, latency=latency), policy="paper_additive", policy_options=options)
    core.step(0.0, TaskArrived(microbatch("t")))
    return core


@pytest.mark.parametrize(("release_s", "idleness_s", "response_s"), [(0.5, 0.0, 4.5), (2.5, 1.5, 2.5)])
def test_paper_terms_of_the_worked_example(release_s: float, idleness_s: float, response_s: float) -> None:
    core = paper_core()
    (command,) = core.step(release_s, TaskArrived(request("r", arrival_s=release_s)))
    assert isinstance(command, Assign)
    (terms,) = command.terms
    assert terms.idleness_s == idleness_s
    assert terms.response_s == response_s
    assert terms.idleness_profit == -0.2
    assert terms.score == pytest.approx(-0.2 - 0.15 * response_s)


def test_paper_prefers_the_node_that_responds_sooner() -> None:
    latency = constant_latency(1)
    core = core_with(node("a", latency=latency), node("b", latency=latency), policy="paper_additive")
    assert [place(core, 1.0, f"r{index}") for index in range(4)] == ["a", "b", "a", "b"]


def test_paper_breaks_ties_by_the_lowest_id() -> None:
    core = core_with(node("b"), node("a"), node("c"), policy="paper_additive")
    assert place(core, 1.0, "r") == "a"


def test_paper_scores_a_slow_node_as_slow() -> None:
    slow = node("a", latency=constant_latency(prefill=10 * PREFILL_S))
    core = core_with(slow, node("b"), policy="paper_additive")
    assert [place(core, float(index), f"r{index}") for index in range(3)] == ["b", "b", "b"]


def test_larger_lambda_2_gathers_alike_lengths() -> None:
    def placements(lambda_2: float) -> list[str]:
        core = core_with(
            node("a"), node("b"), policy="paper_additive", policy_options={"lambda_1": 0.0, "lambda_2": lambda_2}
        )
        # Same load everywhere, so lambda_1 = 0 leaves lengths and ties: "a" knows short ones, "b" long ones.
        history = [("a", 10), ("b", 1000), ("a", 12), ("b", 1010)]
        for index, (node_id, prompt) in enumerate(history):
            other = "b" if node_id == "a" else "a"
            core.step(0.0, NodeLost(other)) if index == 0 else None
            core.step(0.0, TaskArrived(request(f"h{index}", prompt=prompt)))
            if index == 0:
                core.step(0.0, NodeJoined(node(other)))
        return [place(core, 100.0, f"r{index}", prompt=1000) for index in range(2)]

    assert placements(0.0) == ["a", "a"]
    assert len(placements(5.0)) == 2


def test_every_role_is_both_where_nodes_share() -> None:
    for name in ("lemix", "paper_additive", "round_robin"):
        assert policies.create(name, {}).roles(["a", "b"]) == {"a": NodeRole.BOTH, "b": NodeRole.BOTH}
