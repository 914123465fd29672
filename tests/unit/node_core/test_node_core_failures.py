"""Cancellation and failed ops: everything ends once and frees what it held."""

from collections.abc import Callable

import pytest

from services.latency import OpKind
from services.node_agent.core.types import Cancelled, FreeKv, Op, TaskDone
from tests.unit.node_core.driver import Driver, microbatch, request, sync


def _fails(kind: OpKind, stage: int, nth: int = 1) -> Callable[[int, Op], bool]:
    seen = 0

    def fail(where: int, op: Op) -> bool:
        nonlocal seen
        seen += op.kind is kind and where == stage
        return op.kind is kind and where == stage and seen == nth

    return fail


def test_cancel_while_waiting_ends_at_once_without_freeing() -> None:
    driver = Driver(num_stages=1).at(0.0, request("a"), request("b"))
    driver.run(until_s=0.0)
    assert driver.give(Cancelled("b")) == [TaskDone("b", "cancelled")]
    driver.run()
    assert driver.results == {"a": "length", "b": "cancelled"}


def test_cancel_in_flight_takes_effect_when_the_op_left_the_last_stage() -> None:
    driver = Driver(num_stages=2).at(0.0, request("a", max_tokens=9)).at(0.05, Cancelled("a"), Cancelled("a")).run()
    assert driver.order(1) == "P"
    assert driver.results == {"a": "cancelled"}
    assert driver.ended_s["a"] == pytest.approx(0.2)
    assert driver.core.snapshot().kv_used_tokens == 0


def test_cancel_of_a_running_request_between_ops_frees_its_cache_at_once() -> None:
    driver = Driver(num_stages=1).at(0.0, request("a", max_tokens=9)).at(0.12, request("b", max_tokens=9))
    driver.run(until_s=0.2)
    assert driver.checker.running[0].task_ids == ("b",), "a is between two ops"
    assert driver.give(Cancelled("a")) == [FreeKv("a"), TaskDone("a", "cancelled")]
    assert driver.core.snapshot().kv_used_tokens == 19
    assert driver.run().results == {"a": "cancelled", "b": "length"}


def test_a_prefill_that_failed_ends_its_requests_with_an_error() -> None:
    driver = Driver(num_stages=2, fail=_fails(OpKind.PREFILL, 0)).at(0.0, request("a")).at(0.01, request("b")).run()
    assert driver.results == {"a": "error", "b": "length"}
    assert driver.order(1) == "P"


def test_a_decode_that_failed_ends_its_requests_and_later_ones_decode_on() -> None:
    driver = Driver(num_stages=2, fail=_fails(OpKind.DECODE, 1, nth=2)).at(0.0, request("a", max_tokens=9))
    driver.at(0.35, Cancelled("nobody")).at(2.0, request("b", max_tokens=9)).run()
    assert driver.results == {"a": "error", "b": "length"}
    assert driver.checker.freed == {"a": 1, "b": 1}


def test_cancel_of_a_waiting_microbatch() -> None:
    driver = Driver(num_stages=1).at(0.0, microbatch("m0"), microbatch("m1")).at(0.1, Cancelled("m1")).run()
    assert driver.results == {"m0": "trained", "m1": "cancelled"}
    assert not driver.checker.freed


def test_cancel_of_a_microbatch_whose_op_runs_waits_for_the_op() -> None:
    driver = Driver(num_stages=2).at(0.0, microbatch("m0")).at(0.1, Cancelled("m0")).run()
    assert driver.ended_s == {"m0": pytest.approx(0.2)}
    assert driver.checker.freed == {"m0": 1}
    assert driver.order(0) == "F"
    assert driver.core.snapshot().versions == (0, 0), "a group without gradients takes no step"


def test_cancel_of_a_queued_microbatch_is_immediate() -> None:
    driver = Driver(num_stages=2, durations=lambda s, o: 5.0 if s == 1 and o.kind == "prefill" else 0.1)
    driver.at(0.0, request("r"), microbatch("m0")).run(until_s=1.0)
    assert driver.core.snapshot().queue_lengths == (0, 1)
    assert driver.give(Cancelled("m0"))[:2] == [FreeKv("m0"), TaskDone("m0", "cancelled")]
    assert driver.core.snapshot().queue_lengths == (0, 0)
    driver.run()


def test_cancel_halfway_through_the_backward_still_clears_the_gradients_with_a_step() -> None:
    driver = Driver(num_stages=2).at(0.0, microbatch("m0")).at(0.9, Cancelled("m0")).run()
    assert driver.results == {"m0": "cancelled"}
    assert driver.order(1) == "FBS"
    assert driver.core.snapshot().versions == (1, 1)


def test_a_cancelled_job_with_accumulated_gradients_does_not_block_another() -> None:
    driver = Driver(num_stages=1, group_timeout_s=1e3).at(0.0, microbatch("a0", job="a", accumulation=4))
    driver.at(0.7, microbatch("b0", job="b")).at(0.8, Cancelled("a0")).run()
    assert driver.results == {"a0": "cancelled", "b0": "trained"}
    assert driver.now_s < 2.0


def test_cancel_during_the_step_is_too_late() -> None:
    driver = Driver(num_stages=2).at(0.0, microbatch("m0")).at(1.25, Cancelled("m0")).run()
    assert driver.results == {"m0": "trained"}


def test_cancel_while_the_step_waits_on_an_upper_stage_leaves_the_step_alone() -> None:
    driver = Driver(num_stages=2, durations=lambda s, o: 3.0 if s == 1 and o.kind == "prefill" else 0.1)
    driver.at(0.0, microbatch("m0")).at(0.25, request("r", max_tokens=2)).at(0.8, Cancelled("m0")).run(until_s=0.7)
    assert driver.core.snapshot().queue_lengths == (0, 1)
    driver.run()
    assert driver.results == {"m0": "trained", "r": "length"}
    assert driver.core.snapshot().versions == (1, 1)


def test_cancel_in_the_last_backward_op_keeps_the_gradient_and_ends_the_task() -> None:
    driver = Driver(num_stages=1).at(0.0, microbatch("m0", accumulation=2), microbatch("m1", accumulation=2))
    driver.at(0.3, Cancelled("m0")).run()
    assert driver.results == {"m0": "cancelled", "m1": "trained"}
    assert [op.task_ids for _, op in driver.ops(OpKind.OPTIMIZER_STEP)] == [("m1",)]


@pytest.mark.parametrize("kind", [OpKind.TRAIN_FORWARD, OpKind.TRAIN_BACKWARD])
@pytest.mark.parametrize("stage", [0, 1])
def test_a_failed_microbatch_ends_alone_and_its_group_goes_on(kind: OpKind, stage: int) -> None:
    driver = Driver(num_stages=2, fail=_fails(kind, stage))
    driver.at(0.0, *[microbatch(f"m{i}", accumulation=3) for i in range(3)]).run()
    assert driver.results == {"m0": "error", "m1": "trained", "m2": "trained"}
    assert driver.checker.freed == {"m0": 1}


@pytest.mark.parametrize("stage", [0, 1])
def test_a_failed_step_ends_its_tasks_and_keeps_the_stages_at_one_version(stage: int) -> None:
    driver = Driver(num_stages=2, fail=_fails(OpKind.OPTIMIZER_STEP, stage))
    driver.at(0.0, microbatch("m0"), microbatch("m1"), request("r", max_tokens=60)).run()
    assert driver.results == {"m0": "error", "m1": "trained", "r": "length"}
    assert driver.core.snapshot().versions == (2, 2)


def test_failed_syncs_leave_the_stages_at_one_version() -> None:
    driver = Driver(num_stages=2, fail=lambda stage, op: op.kind is OpKind.WEIGHT_SYNC and stage == 0)
    driver.at(0.0, sync("snapshot", False), sync("apply", True), request("r", max_tokens=3)).run()
    assert driver.order(0).count("W") == 2
    assert driver.order(1).count("W") == 1
    assert driver.core.snapshot().versions == (1, 1)
