"""The way of a request through the core: placed, deferred, refused, cancelled, moved."""

import pytest

from services.scheduler.core.commands import Assign, CancelOnNode, Defer, Drop, Reject
from services.scheduler.core.events import (
    NodeJoined,
    NodeLost,
    TaskArrived,
    TaskCancelled,
    TaskEnded,
    TaskRecovered,
    Tick,
)
from tests.unit.scheduler_core.support import assigned, core_with, node, request


def test_request_without_a_node_waits_and_goes_to_the_first_that_joins() -> None:
    core = core_with(policy="round_robin")
    assert core.step(1.0, TaskArrived(request("r"))) == [Defer("r", "no_node")]
    assert core.snapshot().waiting_inference == 1
    assert assigned(core.step(2.0, NodeJoined(node("a")))) == [("r", "a")]
    assert core.snapshot().waiting_inference == 0


def test_inflight_bound_defers_and_the_end_of_a_request_frees_its_place_in_order() -> None:
    core = core_with(node("a", max_inflight_inference=1), policy="round_robin")
    assert assigned(core.step(1.0, TaskArrived(request("r1")))) == [("r1", "a")]
    assert core.step(1.0, TaskArrived(request("r2"))) == [Defer("r2", "inflight_limit")]
    assert core.step(1.0, TaskArrived(request("r3"))) == [Defer("r3", "inflight_limit")]
    assert core.step(1.5, Tick()) == []  # told once
    assert assigned(core.step(2.0, TaskEnded("r1", "a", ok=True, output_tokens=3))) == [("r2", "a")]
    assert assigned(core.step(3.0, TaskEnded("r2", "a", ok=False))) == [("r3", "a")]


def test_reason_is_told_again_when_it_changes() -> None:
    core = core_with(policy="round_robin")
    core.step(1.0, TaskArrived(request("r1")))
    core.step(1.0, TaskArrived(request("r2")))
    commands = core.step(2.0, NodeJoined(node("a", max_inflight_inference=1)))
    assert assigned(commands) == [("r1", "a")]
    assert Defer("r2", "inflight_limit") in commands


def test_waiting_bound_rejects_with_a_retry_time() -> None:
    core = core_with(policy="round_robin", max_waiting_inference=2)
    for task_id in ("r1", "r2"):
        core.step(1.0, TaskArrived(request(task_id)))
    (command,) = core.step(1.0, TaskArrived(request("r3")))
    assert isinstance(command, Reject)
    assert (command.task_id, command.code) == ("r3", "OVERLOADED")
    assert command.retry_after_s is not None
    assert command.retry_after_s > 0
    assert core.snapshot().waiting_inference == 2


def test_request_longer_than_every_context_is_rejected_with_the_numbers() -> None:
    core = core_with(node("a", max_context_tokens=128), node("b", max_context_tokens=256), policy="round_robin")
    (command,) = core.step(1.0, TaskArrived(request("r", prompt=200, output=57)))
    assert isinstance(command, Reject)
    assert command.code == "CONTEXT_LENGTH_EXCEEDED"
    assert "257" in command.message
    assert "256" in command.message
    assert assigned(core.step(1.0, TaskArrived(request("s", prompt=200, output=56)))) == [("s", "b")]


def test_request_that_no_cache_holds_is_rejected_as_exhausted() -> None:
    core = core_with(node("a", max_context_tokens=1000, kv_capacity_tokens=100), policy="round_robin")
    (command,) = core.step(1.0, TaskArrived(request("r", prompt=100, output=1)))
    assert isinstance(command, Reject)
    assert command.code == "RESOURCE_EXHAUSTED"


def test_waiting_request_is_rejected_when_the_nodes_that_come_are_too_small() -> None:
    core = core_with(policy="round_robin")
    core.step(1.0, TaskArrived(request("r", prompt=200)))
    commands = core.step(2.0, NodeJoined(node("a", max_context_tokens=100)))
    assert [type(command) for command in commands] == [Reject]
    assert core.snapshot().waiting_inference == 0


def test_long_request_waits_for_the_node_it_fits_while_short_ones_pass() -> None:
    small, large = node("a", max_context_tokens=150), node("b", max_inflight_inference=1)
    core = core_with(small, large, policy="round_robin")
    assert assigned(core.step(1.0, TaskArrived(request("long1", prompt=200)))) == [("long1", "b")]
    assert core.step(1.0, TaskArrived(request("long2", prompt=200))) == [Defer("long2", "inflight_limit")]
    assert assigned(core.step(1.0, TaskArrived(request("short", prompt=50)))) == [("short", "a")]
    assert assigned(core.step(2.0, TaskEnded("long1", "b", ok=True))) == [("long2", "b")]


def test_task_delivered_twice_is_placed_once() -> None:
    core = core_with(node("a"), policy="round_robin", max_waiting_inference=1)
    assert len(core.step(1.0, TaskArrived(request("r")))) == 1
    assert core.step(1.1, TaskArrived(request("r"))) == []
    waiting = core_with(policy="round_robin", max_waiting_inference=1)
    waiting.step(1.0, TaskArrived(request("r")))
    assert waiting.step(1.1, TaskArrived(request("r"))) == []


def test_cancelling_a_waiting_request_drops_it() -> None:
    core = core_with(policy="round_robin")
    core.step(1.0, TaskArrived(request("r")))
    assert core.step(1.1, TaskCancelled("r")) == [Drop("r")]
    assert core.step(1.2, TaskCancelled("r")) == []
    assert core.step(2.0, NodeJoined(node("a"))) == []


def test_cancelling_an_assigned_request_tells_its_node_once() -> None:
    core = core_with(node("a"), policy="round_robin")
    core.step(1.0, TaskArrived(request("r")))
    assert core.step(1.1, TaskCancelled("r")) == [CancelOnNode("r", "a")]
    assert core.step(1.2, TaskCancelled("r")) == []
    assert core.snapshot().nodes[0].inflight_inference == 1
    core.step(1.3, TaskEnded("r", "a", ok=False))
    assert core.snapshot().nodes[0].inflight_inference == 0


def test_work_of_a_lost_node_is_assigned_again_in_the_order_it_came() -> None:
    core = core_with(node("a"), node("b", max_inflight_inference=2), policy="round_robin")
    for task_id in ("r1", "r2", "r3", "r4"):
        core.step(1.0, TaskArrived(request(task_id)))
    # a: r1, r3; b: r2, r4
    commands = core.step(2.0, NodeLost("a", "lease expired"))
    assert commands == [Defer("r1", "inflight_limit"), Defer("r3", "inflight_limit")]
    assert assigned(core.step(3.0, TaskEnded("r2", "b", ok=True))) == [("r1", "b")]
    assert core.step(3.1, TaskEnded("r1", "a", ok=True)) == []  # late report of the lost node
    assert core.snapshot().nodes[0].inflight_inference == 2
    assert assigned(core.step(4.0, TaskEnded("r1", "b", ok=True))) == [("r3", "b")]


def test_lost_work_that_was_cancelled_is_dropped_not_moved() -> None:
    core = core_with(node("a"), policy="round_robin")
    core.step(1.0, TaskArrived(request("r")))
    core.step(1.1, TaskCancelled("r"))
    assert core.step(2.0, NodeLost("a")) == [Drop("r")]
    assert core.step(3.0, NodeJoined(node("a"))) == []


def test_requeued_work_is_never_rejected_by_the_waiting_bound() -> None:
    core = core_with(node("a"), policy="round_robin", max_waiting_inference=1)
    for task_id in ("r1", "r2", "r3"):
        core.step(1.0, TaskArrived(request(task_id)))
    core.step(2.0, NodeLost("a"))
    assert core.snapshot().waiting_inference == 3
    assert core.step(2.1, TaskArrived(request("r2"))) == []  # the ledger delivers it again
    assert [type(command) for command in core.step(2.2, TaskArrived(request("new")))] == [Reject]
    assert len(assigned(core.step(3.0, NodeJoined(node("a"))))) == 3


def test_unknown_names_change_nothing() -> None:
    core = core_with(node("a"), policy="round_robin")
    before = core.snapshot()
    for event in (TaskCancelled("x"), TaskEnded("x", "a", ok=True), NodeLost("x")):
        assert core.step(0.0, event) == []
    assert core.snapshot() == before


def test_recovered_task_stays_where_the_ledger_says() -> None:
    core = core_with(node("a"), node("b"), policy="round_robin")
    assert core.step(1.0, TaskRecovered(request("r"), "b")) == []
    assert core.step(1.0, TaskRecovered(request("r"), "b")) == []
    assert [status.inflight_inference for status in core.snapshot().nodes] == [0, 1]
    assert assigned(core.step(2.0, NodeLost("b"))) == [("r", "a")]


def test_recovered_task_of_an_unknown_node_waits_like_a_new_one() -> None:
    core = core_with(policy="round_robin")
    assert core.step(1.0, TaskRecovered(request("r"), "gone")) == [Defer("r", "no_node")]


def test_node_that_joins_again_with_a_new_profile_keeps_its_work() -> None:
    core = core_with(node("a", max_inflight_inference=1), policy="round_robin")
    core.step(1.0, TaskArrived(request("r1")))
    core.step(1.0, TaskArrived(request("r2")))
    assert assigned(core.step(2.0, NodeJoined(node("a", max_inflight_inference=2)))) == [("r2", "a")]
    assert core.snapshot().nodes[0].inflight_inference == 2


def test_node_that_joins_again_with_other_stages_is_another_node() -> None:
    core = core_with(node("a", 1), policy="paper_additive")
    core.step(1.0, TaskArrived(request("r1")))
    assert assigned(core.step(2.0, NodeJoined(node("a", 2)))) == [("r1", "a")]
    assert core.snapshot().nodes[0].num_stages == 2


@pytest.mark.parametrize("policy", ["round_robin", "lemix", "paper_additive"])
def test_choices_go_where_the_first_one_is_as_long_as_there_is_room(policy: str) -> None:
    core = core_with(node("a", max_inflight_inference=3), node("b"), policy=policy)
    placed = []
    for name, first in (("r", ""), ("r#1", "r"), ("r#2", "r"), ("r#3", "r"), ("q#1", "q")):
        placed += assigned(core.step(1.0, TaskArrived(request(name, choice_of=first))))
    first_node = placed[0][1]
    nodes = [node_id for _, node_id in placed]
    # On "a" three of them fill the node; alone on "b" none of them has to go elsewhere.
    assert nodes[:4] == (["a", "a", "a", "b"] if first_node == "a" else ["b"] * 4)


def test_a_choice_of_a_demoted_request_is_demoted_with_it() -> None:
    core = core_with(node("a"), policy="lemix", policy_options={"demotion": 12.0})
    tasks = [request(name, arrival_s=1.0, ttft_s=0.01, choice_of=of) for name, of in (("r", ""), ("r#1", "r"))]
    first, choice = (next(c for c in core.step(1.0, TaskArrived(task)) if isinstance(c, Assign)) for task in tasks)
    assert first.queue_ttft_s is not None
    assert choice.queue_ttft_s == first.queue_ttft_s
    assert choice.node_id == "a"


def test_assign_carries_the_terms_of_every_candidate() -> None:
    core = core_with(node("a"), node("b"), node("c", max_inflight_inference=1), policy="paper_additive")
    for task_id in ("r1", "r2", "r3", "r4"):
        (command,) = core.step(1.0, TaskArrived(request(task_id)))
        assert isinstance(command, Assign)
        best = max(command.terms, key=lambda terms: terms.score)
        assert command.node_id == best.node_id
    assert {terms.node_id for terms in command.terms} >= {"a", "b"}


def test_held_time_and_span_of_a_node() -> None:
    core = core_with(node("a"), policy="round_robin", hold_s=10.0)
    core.step(1.0, TaskArrived(request("r1")))
    core.step(3.0, TaskEnded("r1", "a", ok=True))
    core.step(8.0, TaskArrived(request("r2")))  # within hold_s: one held interval
    core.step(9.0, TaskEnded("r2", "a", ok=True))
    core.step(50.0, TaskArrived(request("r3")))
    core.step(51.0, TaskEnded("r3", "a", ok=True))
    core.step(51.0, Tick())
    status = core.snapshot().nodes[0]
    assert status.held_s == pytest.approx((19.0 - 1.0) + 1.0)
    assert (status.first_assigned_s, status.last_ended_s) == (1.0, 51.0)
    core.step(100.0, Tick())
    assert core.snapshot().nodes[0].held_s == pytest.approx(18.0 + 11.0)


def test_time_that_falls_is_taken_as_no_time() -> None:
    core = core_with(node("a"), policy="round_robin")
    core.step(5.0, TaskArrived(request("r1")))
    core.step(4.0, TaskEnded("r1", "a", ok=True))
    assert core.snapshot().nodes[0].last_ended_s == 5.0
