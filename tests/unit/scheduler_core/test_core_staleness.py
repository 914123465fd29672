"""Requests that want fresh weights."""

from dataclasses import replace

import pytest

from services.scheduler.core.commands import Defer, Reject
from services.scheduler.core.events import NodeJoined, TaskArrived, TaskEnded, WeightsTold
from services.scheduler.core.policies import POLICIES
from services.scheduler.core.tasks import InferenceTask
from tests.unit.scheduler_core.support import assigned, core_with, node, request, step_ended


def fresh(task_id: str, max_staleness_s: float) -> InferenceTask:
    return replace(request(task_id), max_staleness_s=max_staleness_s)


def test_only_fresh_nodes_are_candidates() -> None:
    core = core_with(node("a"), node("b"), policy="round_robin")
    core.step(1.0, WeightsTold("a", 3, -50.0))
    core.step(1.0, WeightsTold("b", 4, 0.0))
    for number in range(4):
        found = core.step(9.0, TaskArrived(fresh(f"r{number}", 10.0)))
        assert assigned(found) == [(f"r{number}", "b")]
    served = {assigned(core.step(9.0, TaskArrived(request(f"any{number}"))))[0][1] for number in range(2)}
    assert served == {"a", "b"}


def test_a_request_nobody_is_fresh_enough_for_is_refused_with_the_freshest() -> None:
    core = core_with(node("a"), node("b"), policy="round_robin")
    core.step(1.0, WeightsTold("a", 3, -50.0))
    core.step(1.0, WeightsTold("b", 0, None))
    (refusal,) = core.step(12.5, TaskArrived(fresh("r", 10.0)))
    assert isinstance(refusal, Reject)
    assert (refusal.code, refusal.retry_after_s) == ("STALE_WEIGHTS", 1.0)
    assert refusal.message == "no node's weights were trained within the last 10 s; the freshest are 62.5 s old"
    assert core.snapshot().waiting_inference == 0
    core.step(13.0, WeightsTold("a", 4, 12.9))
    assert assigned(core.step(13.0, TaskArrived(fresh("r", 10.0)))) == [("r", "a")], "the same id may come again"


def test_never_trained_weights_are_not_fresh() -> None:
    core = core_with(node("a"), policy="round_robin")
    core.step(1.0, WeightsTold("a", 0, None))
    (refusal,) = core.step(1.0, TaskArrived(fresh("r", 1e9)))
    assert isinstance(refusal, Reject)
    assert refusal.message.endswith("none were ever trained")


def test_a_request_waits_for_what_is_not_known_yet() -> None:
    core = core_with(policy="round_robin")
    assert core.step(0.0, TaskArrived(fresh("r", 5.0))) == [Defer("r", "no_node")]
    assert assigned(core.step(1.0, NodeJoined(node("a")))) == [], "it has not told of its weights"
    assert assigned(core.step(2.0, WeightsTold("a", 1, 1.5))) == [("r", "a")]
    core = core_with(node("a"), policy="round_robin")
    core.step(0.0, TaskArrived(fresh("r", 5.0)))
    (refusal,) = core.step(1.0, WeightsTold("a", 0, None))
    assert isinstance(refusal, Reject)


def test_a_request_waits_for_a_fresh_node_that_is_full() -> None:
    core = core_with(node("a", max_inflight_inference=1), node("b"), policy="round_robin")
    core.step(0.0, WeightsTold("a", 2, 0.0))
    core.step(0.0, WeightsTold("b", 1, -100.0))
    assert assigned(core.step(1.0, TaskArrived(fresh("r0", 10.0)))) == [("r0", "a")]
    assert assigned(core.step(1.0, TaskArrived(fresh("r1", 10.0)))) == []
    assert assigned(core.step(2.0, TaskEnded("r0", "a", ok=True, output_tokens=1))) == [("r1", "a")]
    assert assigned(core.step(3.0, TaskArrived(fresh("r2", 10.0)))) == []
    late = core.step(30.0, TaskEnded("r1", "a", ok=True, output_tokens=1))
    assert [command.code for command in late if isinstance(command, Reject)] == ["STALE_WEIGHTS"]


def test_an_optimizer_step_makes_fresh_before_the_node_tells() -> None:
    core = core_with(node("a"), policy="round_robin")
    core.step(1.0, WeightsTold("a", 0, None))
    core.step(7.0, step_ended("a", 7.0))
    assert assigned(core.step(8.0, TaskArrived(fresh("r", 2.0)))) == [("r", "a")]
    core.step(8.0, WeightsTold("a", 0, None))  # the step was skipped: its gradient was not finite
    assert isinstance(core.step(8.0, TaskArrived(fresh("q", 2.0)))[0], Reject)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_keeps_to_fresh_nodes(policy: str) -> None:
    core = core_with(*(node(name) for name in "abcd"), policy=policy)
    for name, trained_s in zip("abcd", (0.0, -100.0, 0.0, None), strict=True):
        core.step(0.0, WeightsTold(name, 1, trained_s))
    placed = [pair for number in range(8) for pair in assigned(core.step(1.0, TaskArrived(fresh(f"r{number}", 10.0))))]
    assert {node_id for _, node_id in placed} <= {"a", "c"}
    assert placed
