"""Micro-batches, accumulation groups, the optimizer step and the version rule."""

from itertools import accumulate

import pytest

from services.latency import OpKind
from services.node_agent.core.types import Cancelled, Op, QueueOrder
from tests.unit.node_core.driver import DURATIONS, Driver, microbatch, request, sync


def test_a_microbatch_goes_up_and_down_and_the_step_goes_up() -> None:
    driver = Driver(num_stages=2).at(0.0, microbatch("m0")).run()
    assert (driver.order(0), driver.order(1)) == ("FBS", "FBS")
    assert driver.results == {"m0": "trained"}
    assert driver.core.snapshot().versions == (1, 1)
    forward = driver.ops(OpKind.TRAIN_FORWARD)[0][1]
    assert (forward.num_tokens, forward.batch, forward.subject) == (16, 2, "job")


def test_a_group_takes_one_step_for_all_its_microbatches() -> None:
    driver = Driver(num_stages=1).at(0.0, *[microbatch(f"m{i}", accumulation=3) for i in range(6)]).run()
    steps = [op for _, op in driver.ops(OpKind.OPTIMIZER_STEP)]
    assert [(op.version, op.task_ids) for op in steps] == [(0, ("m0", "m1", "m2")), (1, ("m3", "m4", "m5"))]
    assert set(driver.results.values()) == {"trained"}


def test_microbatches_of_a_job_run_in_the_order_of_their_sequence() -> None:
    driver = Driver(num_stages=1, max_inflight_training=1).at(0.0, request("busy"))
    driver.at(0.01, *[microbatch(f"m{i}", accumulation=4) for i in (2, 0, 3, 1)]).run()
    assert [op.task_ids[0] for _, op in driver.ops(OpKind.TRAIN_FORWARD)] == ["m0", "m1", "m2", "m3"]


def test_the_next_forward_starts_while_earlier_microbatches_are_in_flight() -> None:
    driver = Driver(num_stages=2, max_inflight_training=3)
    driver.at(0.0, *[microbatch(f"m{i}", accumulation=4) for i in range(4)]).run()
    assert driver.order(0) == "FFFBFBBBS"


def test_drain_starts_the_next_group_only_behind_the_step_and_follows_it() -> None:
    driver = Driver(num_stages=3, max_inflight_training=4).at(0.0, *[microbatch(f"m{i}") for i in range(3)]).run()
    assert driver.order(0) == "FBSFBSFBS"
    step_top = driver.ops(OpKind.OPTIMIZER_STEP, stage=2)[0][0]
    assert driver.ops(OpKind.TRAIN_FORWARD)[1][0] < step_top
    assert [op.version for _, op in driver.ops(OpKind.TRAIN_FORWARD, stage=2)] == [0, 1, 2]


def test_stash_lets_the_next_groups_start_and_keeps_their_gradients_apart() -> None:
    driver = Driver(num_stages=2, max_inflight_training=2, weight_handling="stash")
    driver.at(0.0, *[microbatch(f"m{i}") for i in range(4)]).run()
    assert driver.order(0).startswith("FF")
    for stage in (0, 1):
        seen = [
            op.task_ids[0] + op.kind.value[0] for _, s, op in driver.runs if s == stage and op.kind != "train_forward"
        ]
        assert seen == [f"m{i}{letter}" for i in range(4) for letter in "to"], f"stage {stage} mixed groups"
    stale = [op for _, op in driver.ops(OpKind.TRAIN_BACKWARD)]
    assert [op.version for op in stale] == [0, 0, 1, 2], "gradients are one step late"


def test_jobs_take_turns_group_by_group() -> None:
    driver = Driver(num_stages=1).at(0.0, request("busy"))
    driver.at(0.01, *[microbatch(f"{job}{i}", job=job, accumulation=2) for job in "ab" for i in range(4)]).run()
    jobs = [op.subject for _, op in driver.ops(OpKind.OPTIMIZER_STEP)]
    assert jobs == ["a", "b", "a", "b"]
    assert all(len({i[0] for i in op.task_ids}) == 1 for _, op in driver.ops(OpKind.OPTIMIZER_STEP))


def test_the_last_microbatch_of_a_job_closes_its_group() -> None:
    driver = Driver(num_stages=1).at(0.0, microbatch("m0", accumulation=8), microbatch("m1", accumulation=8, last=True))
    driver.run()
    assert driver.order() in ("FFBBS", "FBFBS")
    assert driver.now_s < driver.config.group_timeout_s + 0.5


def test_an_unfinished_group_steps_after_its_timeout_and_blocks_no_other_job() -> None:
    driver = Driver(num_stages=1, group_timeout_s=2.0)
    driver.at(0.0, microbatch("a0", job="a", accumulation=8)).at(0.1, microbatch("b0", job="b")).run()
    assert driver.results == {"a0": "trained", "b0": "trained"}
    step_s, step = driver.ops(OpKind.OPTIMIZER_STEP)[0]
    assert step.task_ids == ("a0",)
    assert step_s == 0.6 + 2.0


def test_a_late_microbatch_restarts_the_group_timeout() -> None:
    driver = Driver(num_stages=1, group_timeout_s=1.0).at(0.0, microbatch("m0", accumulation=3))
    driver.at(1.0, microbatch("m1", accumulation=3)).run()
    assert [op.task_ids for _, op in driver.ops(OpKind.OPTIMIZER_STEP)] == [("m0", "m1")]
    assert driver.ops(OpKind.OPTIMIZER_STEP)[0][0] == 1.6 + 1.0


def test_an_iteration_runs_at_one_version_on_every_stage() -> None:
    driver = Driver(num_stages=3).at(0.0, *[request(f"r{i}", max_tokens=60) for i in range(4)])
    driver.at(0.0, *[microbatch(f"m{i}") for i in range(5)]).run()
    versions: dict[int, set[int]] = {}
    for _, _, op in driver.runs:
        versions.setdefault(op.op_id, set()).add(op.version)
    assert all(len(found) == 1 for found in versions.values())
    assert {op.version for _, op in driver.ops(OpKind.DECODE)} >= {0, 1, 2}
    assert driver.core.snapshot().versions == (5, 5, 5)


def test_a_step_waits_on_an_upper_stage_for_older_ops_and_newer_ones_wait_for_it() -> None:
    def durations(stage: int, op: Op) -> float:
        return 1.0 if (stage, op.kind) == (1, OpKind.PREFILL) else DURATIONS[op.kind]

    driver = Driver(num_stages=2, durations=durations, max_batch=1).at(0.0, microbatch("m0"))
    driver.at(1.0, *[request(f"r{i}") for i in range(2)]).at(1.2, request("new", max_tokens=2)).run()
    order = [(op.kind, op.version) for _, s, op in driver.runs if s == 1 and op.kind is not OpKind.DECODE]
    step = order.index((OpKind.OPTIMIZER_STEP, 0))
    assert all(version == 0 for _, version in order[:step])
    assert all(version == 1 for _, version in order[step + 1 :])


def test_a_snapshot_keeps_the_version_and_sees_one_version_everywhere() -> None:
    driver = Driver(num_stages=3).at(0.0, microbatch("m0"), microbatch("m1")).at(0.65, sync("s", False))
    driver.at(0.0, request("r", max_tokens=30)).run()
    snapshots = [op for _, _, op in driver.runs if op.kind is OpKind.WEIGHT_SYNC]
    assert len(snapshots) == 3
    assert len({op.version for op in snapshots}) == 1
    assert driver.core.snapshot().versions == (2, 2, 2)


def test_applied_weights_raise_the_version_and_wait_for_microbatches_in_flight() -> None:
    driver = Driver(num_stages=2, max_inflight_training=2).at(
        0.0, *[microbatch(f"m{i}", accumulation=4) for i in range(4)]
    )
    driver.at(0.3, sync("average", True)).run()
    apply_s = driver.ops(OpKind.WEIGHT_SYNC)[0][0]
    backwards = [time_s for time_s, op in driver.ops(OpKind.TRAIN_BACKWARD) if op.version == 0]
    assert apply_s >= max(backwards) + DURATIONS[OpKind.TRAIN_BACKWARD] - 1e-9
    assert driver.core.snapshot().versions == (2, 2)
    assert set(driver.results.values()) == {"trained"}


def test_stash_applies_weights_without_waiting() -> None:
    driver = (
        Driver(num_stages=2, weight_handling="stash").at(0.0, microbatch("m0")).at(0.1, sync("replace", True)).run()
    )
    assert driver.ops(OpKind.WEIGHT_SYNC)[0][0] == 0.2
    assert driver.ops(OpKind.TRAIN_BACKWARD)[0][1].version == 0


def test_syncs_run_in_order_and_are_not_starved_by_serving() -> None:
    driver = Driver(num_stages=2, max_batch=4).at(0.0, *[request(f"r{i}", max_tokens=50) for i in range(8)])
    driver.at(1.0, sync("one", False), sync("two", True)).run()
    syncs = driver.ops(OpKind.WEIGHT_SYNC)
    assert [op.subject for _, op in syncs] == ["one", "two"]
    assert syncs[-1][0] <= 1.0 + 2 * max(DURATIONS[OpKind.PREFILL], DURATIONS[OpKind.DECODE])


def test_fifo_syncs_too() -> None:
    driver = Driver(num_stages=2, queue_order=QueueOrder.FIFO).at(0.0, microbatch("m0"), request("r", max_tokens=5))
    driver.at(0.1, sync("s", True), Cancelled("nobody")).run()
    assert driver.core.snapshot().versions == (2, 2)
    assert driver.core.snapshot().pending_syncs == 0


def test_inference_runs_between_the_pieces_of_a_cut_op() -> None:
    def half(stage: int, op: Op) -> float:
        return DURATIONS[op.kind] / op.parts

    driver = Driver(num_stages=1, durations=half).at(0.0, microbatch("m0", parts=2))
    driver.at(0.01, request("r0", arrival_s=0.01)).run()
    pieces = [(op.kind, op.part) for _, _, op in driver.runs]
    assert pieces == [
        (OpKind.TRAIN_FORWARD, 0),
        (OpKind.PREFILL, 0),
        (OpKind.TRAIN_FORWARD, 1),
        (OpKind.TRAIN_BACKWARD, 0),
        (OpKind.TRAIN_BACKWARD, 1),
        (OpKind.OPTIMIZER_STEP, 0),
    ]


def test_weights_that_drain_do_not_change_between_the_pieces_of_a_forward() -> None:
    driver = Driver(num_stages=2).at(0.0, microbatch("m0", parts=3))
    driver.at(0.01, sync("s0", changes_weights=True)).run()
    begin_s = driver.ops(OpKind.WEIGHT_SYNC)[0][0]
    assert begin_s >= max(time_s for time_s, _ in driver.ops(OpKind.TRAIN_BACKWARD))
    assert driver.results == {"m0": "trained"}


def test_pieces_after_a_weight_change_run_with_stashed_weights() -> None:
    driver = Driver(num_stages=2, weight_handling="stash").at(0.0, microbatch("m0", parts=3))
    driver.at(0.01, sync("s0", changes_weights=True)).run()
    begin_s, change = driver.ops(OpKind.WEIGHT_SYNC)[0]
    later = [op for time_s, op in driver.ops(OpKind.TRAIN_FORWARD) if time_s > begin_s]
    assert later
    assert {op.version for op in later} == {change.oldest_version} == {0}
    assert driver.results == {"m0": "trained"}


def test_a_step_does_not_wait_for_what_runs_with_older_weights() -> None:
    """Forwards queue up on a slow stage 1; the steps of earlier micro-batches come up while they wait."""

    def duration_s(stage: int, op: Op) -> float:
        return 3.0 if stage and op.kind is OpKind.TRAIN_FORWARD else 0.1

    driver = Driver(durations=duration_s, num_stages=2, weight_handling="stash", max_inflight_training=4)
    driver.at(0.0, *(microbatch(f"m{index}") for index in range(4))).run()
    assert set(driver.results.values()) == {"trained"}
    steps = [op for _, op in driver.ops(OpKind.OPTIMIZER_STEP, stage=1)]
    assert any(op.oldest_version < op.version for op in steps)
    versions = [(op.version, op.changes_weights) for _, stage, op in driver.runs if stage == 1]
    assert any(
        not changes and version < highest
        for (version, changes), highest in zip(versions, _highest(versions), strict=True)
    )


def _highest(versions: list[tuple[int, bool]]) -> list[int]:
    """Weights version of a stage before each of its ops."""
    return list(accumulate((int(changes) for _, changes in versions[:-1]), initial=0))


def test_backwards_of_several_groups_need_as_many_gradient_buffers() -> None:
    """With one buffer stage 1 waits for the step to come up from stage 0; with one per stage it need not."""

    def span_s(gradient_buffers: int) -> float:
        driver = Driver(
            num_stages=2, weight_handling="stash", max_inflight_training=8, gradient_buffers=gradient_buffers
        )
        driver.at(0.0, *(microbatch(f"m{index}") for index in range(8))).run()
        assert set(driver.results.values()) == {"trained"}
        begins = [time_s for time_s, _ in driver.ops(OpKind.TRAIN_BACKWARD, stage=1)]
        return max(begins) - min(begins)

    assert span_s(2) < span_s(1)


def test_steps_run_in_the_order_in_which_their_groups_are_complete() -> None:
    """The pieces of a long micro-batch let a short one pass."""
    driver = Driver(num_stages=2, weight_handling="stash", max_inflight_training=2, gradient_buffers=2)
    driver.at(0.0, microbatch("m0", parts=8), microbatch("m1")).run()
    assert [op.task_ids for _, op in driver.ops(OpKind.OPTIMIZER_STEP)] == [("m1",), ("m0",)]
    assert set(driver.results.values()) == {"trained"}


def test_a_cut_microbatch_can_be_cancelled_between_its_pieces() -> None:
    driver = Driver(num_stages=1).at(0.0, microbatch("m0", parts=4), microbatch("m1")).at(0.01, Cancelled("m0")).run()
    assert driver.results == {"m0": "cancelled", "m1": "trained"}
    assert [op.part for _, op in driver.ops(OpKind.TRAIN_FORWARD)] == [0, 0]


@pytest.mark.parametrize("weights", ["drain", "stash"])
@pytest.mark.parametrize("schedule", ["async", "gpipe", "1f1b"])
def test_gradients_are_applied_before_the_weights_go_back(weights: str, schedule: str) -> None:
    """A group that is not full steps as well; micro-batches that have not begun train on the restored weights."""
    driver = Driver(num_stages=2, weight_handling=weights, training_schedule=schedule, max_inflight_training=2)
    driver.at(0.0, *[microbatch(f"m{i}", accumulation=3) for i in range(5)]).at(0.3, sync("back", True, settles=True))
    driver.run()
    assert driver.order(0).startswith("FFBBSWFF")
    assert set(driver.results.values()) == {"trained"}


@pytest.mark.parametrize("weights", ["drain", "stash"])
def test_a_cancelled_job_leaves_no_gradient_behind_a_restore(weights: str) -> None:
    driver = Driver(num_stages=1, weight_handling=weights, group_timeout_s=60.0)
    driver.at(0.0, microbatch("m0", accumulation=2))
    driver.at(0.3, Cancelled("m0"), sync("back", True, settles=True), microbatch("n0", job="next")).run()
    assert driver.order() == "FBSWFBS"
    assert driver.results == {"m0": "cancelled", "n0": "trained"}
