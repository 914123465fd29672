"""Nodes that are about to leave."""

import pytest

from services.latency import OpKind
from services.scheduler.core.events import (
    NodeDraining,
    NodeJoined,
    NodeLost,
    NodeProfiled,
    OpFinished,
    TaskArrived,
    TaskEnded,
    TaskRecovered,
    Tick,
)
from services.scheduler.core.node_spec import NodeRole
from services.scheduler.core.policies import POLICIES
from tests.unit.scheduler_core.support import assigned, constant_latency, core_with, microbatch, node, request


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"separate", "separate_dynamic"}))
def test_a_draining_node_gets_nothing_new_and_keeps_what_it_has(policy: str) -> None:
    core = core_with(node("a"), node("b"), policy=policy)
    for index in range(4):
        core.step(1.0, TaskArrived(request(f"r{index}")))
    held = core.snapshot().nodes[0].inflight_inference
    assert core.step(2.0, NodeDraining("a")) == []
    assert core.step(2.0, NodeDraining("a")) == []
    placed = [pair for index in range(4) for pair in assigned(core.step(3.0, TaskArrived(request(f"s{index}"))))]
    placed += [pair for index in range(2) for pair in assigned(core.step(3.0, TaskArrived(microbatch(f"m{index}"))))]
    assert {node_id for _, node_id in placed} == {"b"}
    drained = core.snapshot().nodes[0]
    assert (drained.role, drained.inflight_inference) == (NodeRole.UNUSED, held)


def test_what_a_draining_node_could_not_finish_goes_to_others() -> None:
    core = core_with(node("a"), policy="round_robin")
    for task_id in ("r1", "r2"):
        core.step(1.0, TaskArrived(request(task_id)))
    core.step(2.0, NodeDraining("a"))
    core.step(2.1, TaskEnded("r1", "a", ok=True, output_tokens=1))
    core.step(2.2, NodeLost("a", "left"))
    assert assigned(core.step(3.0, NodeJoined(node("b")))) == [("r2", "b")]


def test_a_node_that_joins_again_drains_no_more() -> None:
    core = core_with(node("a"), policy="round_robin")
    core.step(1.0, NodeDraining("a"))
    assert assigned(core.step(1.1, TaskArrived(request("r")))) == []
    assert assigned(core.step(1.2, NodeJoined(node("a")))) == [("r", "a")]


def test_separate_clusters_find_another_server_for_one_that_drains() -> None:
    core = core_with(node("a"), node("b"), node("c"), node("d"), policy="separate")
    core.step(1.0, NodeDraining("a"))
    core.step(1.0, NodeDraining("b"))
    roles = {status.node_id: status.role for status in core.snapshot().nodes}
    assert roles == {"a": NodeRole.UNUSED, "b": NodeRole.UNUSED, "c": NodeRole.SERVE, "d": NodeRole.TRAIN}


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_work_of_nodes_that_all_drain_is_still_reported(policy: str) -> None:
    core = core_with(node("a"), node("b"), policy=policy, sync_every_steps=1)
    core.step(1.0, TaskArrived(microbatch("m")))
    for node_id in ("a", "b"):
        core.step(2.0, NodeDraining(node_id))
    for node_id in ("a", "b"):
        assert core.step(3.0, OpFinished(node_id, 0, OpKind.OPTIMIZER_STEP, 2.9, 3.0)) == []


def test_draining_of_an_unknown_node_changes_nothing() -> None:
    core = core_with(node("a"), policy="round_robin")
    before = core.snapshot()
    assert core.step(0.0, NodeDraining("x")) == []
    assert core.snapshot() == before


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_node_that_may_return_takes_its_training_along_and_nothing_else(policy: str) -> None:
    core = core_with(node("a"), policy=policy)
    core.step(1.0, TaskArrived(request("r")))
    for index in range(2):
        core.step(1.0, TaskArrived(microbatch(f"m{index}")))
    before = core.snapshot()
    taken = [f"m{index}" for index in range(before.nodes[0].inflight_training)]
    core.step(2.0, NodeLost("a", "test", keeps_training=True))
    assert core.snapshot().waiting_training == before.waiting_training
    core.step(3.0, NodeJoined(node("a")))
    for task_id in taken:
        core.step(3.0, TaskRecovered(microbatch(task_id), "a"))
    back = core.snapshot()
    assert back.nodes[0].inflight_training + back.waiting_training == 2
    assert back.nodes[0].inflight_training >= len(taken)
    for task_id in taken:
        core.step(4.0, TaskEnded(task_id, "a", ok=True))
    assert core.snapshot().nodes[0].inflight_training + core.snapshot().waiting_training == 2 - len(taken)


def test_a_new_profile_is_predicted_with_and_nothing_else_changes() -> None:
    core = core_with(node("a"), node("b"), policy="round_robin")
    core.step(1.0, TaskArrived(request("r")))
    core.step(1.0, NodeDraining("b"))
    core.step(2.0, Tick())
    before = core.snapshot()
    assert core.step(2.0, NodeProfiled("a", constant_latency(1, prefill=9.0))) == []
    assert core.snapshot() == before
    assert core.step(2.0, NodeProfiled("a", constant_latency(2))) == []
    assert core.step(2.0, NodeProfiled("x", constant_latency(1))) == []
