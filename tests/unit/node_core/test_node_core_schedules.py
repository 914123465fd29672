"""Synchronous pipeline training: the textbook orders of GPipe and 1F1B, their bubbles, and where they must give way."""

import pytest

from services.latency import OpKind
from services.node_agent.core.types import Cancelled, Event, QueueOrder
from tests.unit.node_core.driver import SHORT, Driver, microbatch, request, sync

#: Forwards and backwards last alike, steps take no time.
EQUAL = dict.fromkeys(OpKind, 1.0) | {OpKind.OPTIMIZER_STEP: 0.0}
M = 4
#: Per stage, from stage 0.
TEXTBOOK = {
    ("gpipe", 2): ["F1F2F3F4B1B2B3B4"] * 2,
    ("gpipe", 3): ["F1F2F3F4B1B2B3B4"] * 3,
    ("gpipe", 4): ["F1F2F3F4B1B2B3B4"] * 4,
    ("1f1b", 2): ["F1F2B1F3B2F4B3B4", "F1B1F2B2F3B3F4B4"],
    ("1f1b", 3): ["F1F2F3B1F4B2B3B4", "F1F2B1F3B2F4B3B4", "F1B1F2B2F3B3F4B4"],
    ("1f1b", 4): ["F1F2F3F4B1B2B3B4", "F1F2F3B1F4B2B3B4", "F1F2B1F3B2F4B3B4", "F1B1F2B2F3B3F4B4"],
}


def _group(first: int = 1, size: int = M, job: str = "m", parts: int = 1) -> list[Event]:
    ids = range(first, first + size)
    return [microbatch(f"{job}{i}", job=job, accumulation=size, parts=parts) for i in ids]


def _orders(driver: Driver) -> list[str]:
    """Per stage, as in the table above."""
    return [
        "".join(
            f"{SHORT[op.kind]}{op.task_ids[0][1:]}"
            for _, where, op in driver.runs
            if where == stage and op.kind is not OpKind.OPTIMIZER_STEP
        )
        for stage in range(driver.config.num_stages)
    ]


@pytest.mark.parametrize("order", QueueOrder)
@pytest.mark.parametrize(("schedule", "stages"), TEXTBOOK)
def test_a_mini_batch_runs_in_the_textbook_order_with_the_textbook_bubble(
    schedule: str, stages: int, order: QueueOrder
) -> None:
    driver = Driver(num_stages=stages, training_schedule=schedule, durations=EQUAL, queue_order=order)
    driver.at(0.0, *_group()).run()
    assert _orders(driver) == TEXTBOOK[schedule, stages]
    assert set(driver.results.values()) == {"trained"}
    makespan_s, work_s = driver.now_s, 2.0 * M
    assert (makespan_s - work_s) / makespan_s == pytest.approx((stages - 1) / (M + stages - 1))


@pytest.mark.parametrize("weight_handling", ["drain", "stash"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_no_forward_of_the_next_mini_batch_runs_on_a_stage_before_the_step(schedule: str, weight_handling: str) -> None:
    driver = Driver(
        num_stages=3, training_schedule=schedule, weight_handling=weight_handling, max_inflight_training=16
    ).at(0.0, *_group(), *_group(5))
    driver.run()
    assert set(driver.results.values()) == {"trained"}
    for stage in range(3):
        assert driver.order(stage).count("S") == 2
        first, second, rest = driver.order(stage).split("S")
        assert (first.count("F"), first.count("B")) == (second.count("F"), second.count("B")) == (M, M)
        assert not rest
    assert all(op.version == (op.group - 1) for _, _, op in driver.runs if op.kind is not OpKind.OPTIMIZER_STEP)


def test_asynchronous_training_with_stashed_weights_does_start_the_next_one() -> None:
    driver = Driver(num_stages=3, weight_handling="stash", max_inflight_training=16).at(0.0, *_group(), *_group(5))
    driver.run()
    first, _, _ = driver.order().split("S")
    assert first.count("F") > M


def test_the_window_of_asynchronous_training_does_not_bind() -> None:
    driver = Driver(num_stages=2, training_schedule="gpipe", max_inflight_training=1).at(0.0, *_group()).run()
    assert driver.order(1) == "FFFFBBBBS"


def test_1f1b_takes_turns_when_both_are_ready() -> None:
    """While stage 0 runs a long prefill, two backwards come back to it."""
    driver = Driver(num_stages=2, training_schedule="1f1b", durations=EQUAL | {OpKind.PREFILL: 5.0})
    driver.at(0.0, *_group(size=6)).at(2.5, request("r")).run()
    assert driver.order(0) == "FFP" + "BF" * 4 + "BBS"


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_requests_run_in_between(schedule: str) -> None:
    driver = Driver(num_stages=2, training_schedule=schedule).at(0.0, *_group())
    driver.at(0.3, request("r", max_tokens=5, arrival_s=0.3)).run()
    assert driver.results["r"] == "length"
    assert driver.ended_s["r"] < driver.ended_s["m1"]
    assert driver.results["m4"] == "trained"


def test_gpipe_flushes_a_group_that_its_timeout_closes() -> None:
    driver = Driver(num_stages=2, training_schedule="gpipe", group_timeout_s=2.0).at(0.0, *_group()[:2]).run()
    assert driver.order(1) == "FFBBS"
    turned_s = 0.2 * 3
    assert driver.ops(OpKind.TRAIN_BACKWARD, stage=1)[0][0] == pytest.approx(turned_s + 2.0)
    assert set(driver.results.values()) == {"trained"}


def test_gpipe_flushes_when_the_job_says_that_this_was_the_last() -> None:
    driver = Driver(num_stages=2, training_schedule="gpipe", group_timeout_s=1e6)
    driver.at(0.0, *_group()[:2], microbatch("m3", job="m", accumulation=M, last=True)).run()
    assert driver.order(1) == "FFFBBBS"


def test_gpipe_flushes_for_a_weight_change_and_goes_on_with_the_group() -> None:
    driver = Driver(num_stages=2, training_schedule="gpipe", group_timeout_s=50.0).at(0.0, *_group()[:2])
    driver.at(1.0, sync("s", True)).at(5.0, *_group(3)[:2]).run()
    assert driver.order(1).startswith("FFBBWFFBB")
    assert set(driver.results.values()) == {"trained"}


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("at_s", [0.1, 0.5, 0.9, 1.3])
def test_a_cancelled_or_failed_microbatch_holds_nobody_up(schedule: str, at_s: float) -> None:
    cancelled = Driver(num_stages=3, training_schedule=schedule).at(0.0, *_group()).at(at_s, Cancelled("m2")).run()
    others = {"m1": "trained", "m3": "trained", "m4": "trained"}
    assert {**cancelled.results, "m2": ""} == {**others, "m2": ""}

    failed = Driver(num_stages=3, training_schedule=schedule, fail=lambda stage, op: stage == 1 and "m2" in op.task_ids)
    failed.at(0.0, *_group()).run()
    assert failed.results["m2"] == "error"


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_cut_microbatch_follows_the_schedule_too(schedule: str) -> None:
    driver = Driver(num_stages=3, training_schedule=schedule).at(0.0, *_group(parts=3)).run()
    assert driver.order(2).count("F") == 3 * M
    assert set(driver.results.values()) == {"trained"}
