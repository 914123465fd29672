"""Micro-batches: the A-PP rule, the order of a job, hold-back and its starvation bound."""

from dataclasses import replace

import pytest

from services.latency import OpKind
from services.scheduler.core.commands import CancelOnNode, Command, Defer, Drop, Reject, TakeBack
from services.scheduler.core.events import (
    JobCancelled,
    JobEnded,
    JobPaused,
    JobResumed,
    NodeJoined,
    NodeLost,
    OpFinished,
    TaskArrived,
    TaskEnded,
    Tick,
)
from services.scheduler.core.scheduler import SchedulerCore
from services.scheduler.core.tasks import SloTarget
from tests.unit.scheduler_core.support import (
    BACKWARD_S,
    STEP_S,
    assigned,
    backward_ended,
    constant_latency,
    core_with,
    microbatch,
    node,
    request,
    step_ended,
)


def offer(core: SchedulerCore, num: int, *, now_s: float = 0.0, job_id: str = "job") -> list[Command]:
    return [
        command
        for index in range(num)
        for command in core.step(now_s, TaskArrived(microbatch(f"{job_id}-{index}", job_id=job_id, arrival_s=now_s)))
    ]


def test_each_node_gets_a_stream_up_to_its_window() -> None:
    core = core_with(node("a"), node("b"), policy="round_robin", max_inflight_training=2)
    commands = offer(core, 6)
    assert assigned(commands) == [("job-0", "a"), ("job-1", "b"), ("job-2", "a"), ("job-3", "b")]
    assert Defer("job-4", "inflight_limit") in commands
    assert core.snapshot().waiting_training == 2


def test_end_of_a_backward_releases_the_next_before_the_optimizer_step() -> None:
    core = core_with(node("a"), policy="round_robin", max_inflight_training=1)
    offer(core, 3)
    assert assigned(core.step(1.0, backward_ended("a", "job-0", 1.0))) == [("job-1", "a")]
    # The group of two steps now; the end of the tasks releases nothing twice.
    assert assigned(core.step(2.0, TaskEnded("job-0", "a", ok=True))) == []
    assert core.snapshot().nodes[0].inflight_training == 1
    assert assigned(core.step(2.0, TaskEnded("job-1", "a", ok=True))) == [("job-2", "a")]


def _synchronous(task_id: str, job_id: str = "job", accumulation: int = 2) -> TaskArrived:
    return TaskArrived(replace(microbatch(task_id, job_id=job_id), accumulation=accumulation))


def test_a_synchronous_node_gets_the_next_group_when_the_step_of_the_one_before_has_ended() -> None:
    core = core_with(node("a", training_schedule="gpipe"), policy="round_robin", max_inflight_training=1)
    first = [command for index in range(4) for command in core.step(0.0, _synchronous(f"job-{index}"))]
    assert assigned(first) == [("job-0", "a"), ("job-1", "a")], "a whole group, whatever the window of A-PP"
    assert Defer("job-2", "inflight_limit") in first
    for index in range(2):
        assert assigned(core.step(1.0, backward_ended("a", f"job-{index}", 1.0))) == [], "its step is to come"
    assert assigned(core.step(2.0, TaskEnded("job-0", "a", ok=True))) == [("job-2", "a")]
    assert assigned(core.step(2.0, TaskEnded("job-1", "a", ok=True))) == [("job-3", "a")]


def test_groups_of_several_jobs_leave_for_a_synchronous_node_side_by_side() -> None:
    core = core_with(node("a", training_schedule="gpipe"), policy="round_robin")
    arrivals = [_synchronous(f"{job}{index}", job, 2) for index in range(2) for job in "xy"]
    placed = [command for event in arrivals for command in core.step(0.0, event)]
    assert assigned(placed) == [("x0", "a"), ("y0", "a"), ("x1", "a"), ("y1", "a")]


def test_an_asynchronous_node_beside_a_synchronous_one_keeps_its_window() -> None:
    nodes = (node("a", training_schedule="gpipe"), node("b"))
    core = core_with(*nodes, policy="round_robin", max_inflight_training=3)
    placed = [command for index in range(8) for command in core.step(0.0, _synchronous(f"job-{index}"))]
    counts = [node_id for _, node_id in assigned(placed)]
    assert (counts.count("a"), counts.count("b")) == (2, 3)


def test_accumulation_larger_than_the_window_fills() -> None:
    core = core_with(node("a"), policy="lemix", max_inflight_training=2)
    offer(core, 8)
    for index in range(6):
        assert assigned(core.step(1.0 + index, backward_ended("a", f"job-{index}", 1.0 + index))) == [
            (f"job-{index + 2}", "a")
        ]
    assert core.snapshot().nodes[0].inflight_training == 8


def test_more_than_the_bound_is_refused() -> None:
    core = core_with(policy="round_robin", max_waiting_training=2)
    offer(core, 2)
    (command,) = core.step(0.0, TaskArrived(microbatch("x")))
    assert isinstance(command, Reject)
    assert command.code == "OVERLOADED"


def test_cancelled_job_drops_what_waits_and_cancels_what_runs() -> None:
    core = core_with(node("a"), policy="round_robin", max_inflight_training=1)
    offer(core, 2, job_id="one")
    offer(core, 1, job_id="two")
    commands = core.step(1.0, JobCancelled("one"))
    assert commands == [CancelOnNode("one-0", "a"), Drop("one-1"), Defer("two-0", "inflight_limit")]
    assert assigned(core.step(2.0, TaskEnded("one-0", "a", ok=False))) == [("two-0", "a")]


def test_a_paused_job_gives_back_what_waits_and_finishes_what_runs() -> None:
    core = core_with(node("a"), policy="round_robin", max_inflight_training=1)
    offer(core, 3, job_id="one")
    assert core.step(1.0, JobPaused("one")) == [TakeBack("one-1"), TakeBack("one-2")]
    assert core.step(2.0, TaskArrived(microbatch("one-1", job_id="one"))) == [TakeBack("one-1")]
    assert core.step(3.0, NodeLost("a")) == [TakeBack("one-0")]
    core.step(4.0, NodeJoined(node("a")))
    core.step(5.0, JobResumed("one"))
    assert assigned(core.step(6.0, TaskArrived(microbatch("one-0", job_id="one")))) == [("one-0", "a")]


def test_a_cancelled_job_is_not_paused_any_more() -> None:
    core = core_with(node("a"), policy="round_robin")
    core.step(0.0, JobPaused("one"))
    core.step(1.0, JobCancelled("one"))
    assert assigned(offer(core, 1, job_id="one")) == [("one-0", "a")]


@pytest.mark.parametrize("end", [JobEnded("lora"), JobCancelled("lora")])
def test_predictions_of_a_job_follow_its_own_traces_until_it_ends(end: JobEnded | JobCancelled) -> None:
    """A job that trains an adapter, and takes half of what was profiled, changes nothing for another one."""
    core = core_with(node("a"), policy="round_robin", max_inflight_training=4)
    core.step(0.0, TaskArrived(replace(microbatch("lora-0", job_id="lora"), trains_adapter=True)))
    offer(core, 1, job_id="full")
    costs = core._cluster.nodes["a"].costs
    whole_s, step = costs.training_op_s(1, 128), step_ended("a", 1.0)
    half = OpFinished("a", 0, OpKind.TRAIN_BACKWARD, 1.0, 1.0 + 0.5 * BACKWARD_S, ("lora-0",))
    for index in range(10):
        core.step(1.0, half)
        core.step(1.0, step._replace(job_id="lora", begin_s=step.end_s - 0.5 * STEP_S))
        core.step(1.0, backward_ended("a", "full-0", 1.0 + index))
    assert costs.stage_s(0, OpKind.TRAIN_BACKWARD, 1, 128, job_id="lora") < 0.65 * BACKWARD_S
    assert costs.stage_s(0, OpKind.OPTIMIZER_STEP, 1, 1, job_id="lora") < 0.65 * STEP_S
    assert costs.training_op_s(1, 128, "full") == pytest.approx(whole_s)
    core.step(2.0, end)
    assert not costs.knows_job("lora")
    core.step(2.0, step._replace(job_id="lora"))
    if isinstance(end, JobCancelled):
        core.step(2.0, half)
    assert not costs.knows_job("lora"), "what was still on its way brings it back for ever"


def test_training_of_a_lost_node_moves_before_what_waits() -> None:
    core = core_with(node("a"), node("b"), policy="round_robin", max_inflight_training=1)
    offer(core, 4)
    core.step(1.0, NodeLost("a"))
    assert assigned(core.step(2.0, TaskEnded("job-1", "b", ok=True))) == [("job-0", "b")]
    assert assigned(core.step(3.0, TaskEnded("job-0", "b", ok=True))) == [("job-2", "b")]


def test_separate_trains_only_on_its_training_nodes() -> None:
    core = core_with(node("a"), node("b"), node("c"), policy="separate", max_inflight_training=1)
    assert assigned(offer(core, 3)) == [("job-0", "b"), ("job-1", "c")]


# ----------------------------------------------------------------------------- hold-back


def lemix_with_long_training(**config: object) -> SchedulerCore:
    """One node whose training forward (1 s) alone breaks a promise of 0.5 s."""
    spec = node("a", latency=constant_latency(train_forward=1.0))
    return core_with(
        spec,
        policy="lemix",
        default_slo=SloTarget(ttft_s=0.5),
        max_inflight_training=1,
        **{"max_hold_back_s": 3.0, **config},
    )


def arrive(core: SchedulerCore, now_s: float, task_id: str) -> list[Command]:
    return core.step(now_s, TaskArrived(request(task_id, arrival_s=now_s)))


def test_lemix_releases_training_while_no_inference_comes() -> None:
    assert assigned(offer(lemix_with_long_training(), 1)) == [("job-0", "a")]


def test_lemix_holds_training_back_that_would_break_a_waiting_request() -> None:
    core = lemix_with_long_training()
    arrive(core, 1.0, "r1")
    assert core.step(1.1, TaskArrived(microbatch("m", arrival_s=1.1))) == [Defer("m", "held_back")]
    assert core.snapshot().nodes[0].held_back_since_s == 1.1
    wakeup_s = core.next_wakeup_s()
    assert wakeup_s is not None
    assert 1.1 < wakeup_s <= 4.1
    assert assigned(core.step(1.2, TaskEnded("r1", "a", ok=True, output_tokens=1))) == [("m", "a")]
    assert core.snapshot().nodes[0].held_back_since_s is None


def test_lemix_holds_training_back_while_requests_keep_arriving_and_releases_at_the_bound() -> None:
    core = lemix_with_long_training()
    now_s = 1.0
    arrive(core, 0.9, "before")
    core.step(1.0, TaskEnded("before", "a", ok=True, output_tokens=1))
    arrive(core, now_s, "r0")
    core.step(now_s, TaskArrived(microbatch("m", arrival_s=now_s)))
    released_s = None
    for index in range(1, 60):
        now_s = 1.0 + index * 0.1
        commands = core.step(now_s, TaskEnded(f"r{index - 1}", "a", ok=True, output_tokens=1))
        commands += arrive(core, now_s, f"r{index}")
        commands += core.step(now_s, Tick())
        if ("m", "a") in assigned(commands):
            released_s = now_s
            break
    assert released_s == pytest.approx(1.0 + 3.0, abs=0.11)


def test_hold_back_ends_with_a_tick_even_if_nothing_happens() -> None:
    core = lemix_with_long_training()
    arrive(core, 1.0, "r1")
    arrive(core, 1.5, "r2")
    core.step(1.5, TaskArrived(microbatch("m", arrival_s=1.5)))
    for _ in range(200):
        wakeup_s = core.next_wakeup_s()
        assert wakeup_s is not None
        if assigned(core.step(wakeup_s, Tick())):
            assert wakeup_s == pytest.approx(4.5)
            return
    pytest.fail("never released")


def test_hold_back_ends_when_requests_no_longer_come() -> None:
    core = lemix_with_long_training(max_hold_back_s=1000.0)
    for index, now_s in enumerate((1.0, 1.5)):
        arrive(core, now_s, f"r{index}")
        core.step(now_s + 0.1, TaskEnded(f"r{index}", "a", ok=True, output_tokens=1))
    assert assigned(core.step(1.6, TaskArrived(microbatch("m", arrival_s=1.6)))) == []
    # An operation takes 1 s: a request within the next five is likely to meet one.
    assert assigned(core.step(6.4, Tick())) == []
    assert assigned(core.step(6.6, Tick())) == [("m", "a")]


def test_no_hold_back_when_it_is_switched_off() -> None:
    core = lemix_with_long_training(max_hold_back_s=0.0)
    arrive(core, 1.0, "r1")
    assert assigned(core.step(1.1, TaskArrived(microbatch("m", arrival_s=1.1)))) == [("m", "a")]


def test_lemix_holds_back_only_where_the_requests_are() -> None:
    specs = [node(name, latency=constant_latency(train_forward=1.0)) for name in ("a", "b")]
    core = core_with(
        *specs,
        policy="lemix",
        policy_options={"backlog_s": 1.0},
        default_slo=SloTarget(ttft_s=0.5),
        max_inflight_training=1,
    )
    arrive(core, 1.0, "r1")
    commands = offer(core, 2, now_s=1.1)
    assert assigned(commands) == [("job-0", "b")]
    assert core.snapshot().nodes[0].held_back_since_s == 1.1


def test_paper_defers_training_whose_own_response_is_late_while_inference_arrives() -> None:
    core = core_with(node("a"), policy="paper_additive", slo_unit_s=0.1, max_inflight_training=8)
    # Before any inference nothing is held back, whatever its response.
    assert len(assigned(offer(core, 2))) == 2
    arrive(core, 0.1, "r")
    # Forwards and backwards committed: the next micro-batch would respond after more than 5 units of 0.1 s.
    commands = core.step(0.1, TaskArrived(microbatch("late", arrival_s=0.1)))
    assert commands == [Defer("late", "held_back")]
    wakeup_s = core.next_wakeup_s()
    assert wakeup_s is not None
    core.step(0.2, TaskEnded("r", "a", ok=True, output_tokens=1))
    commands = []
    while not commands:
        wakeup_s = core.next_wakeup_s()
        assert wakeup_s is not None
        assert wakeup_s < 1.5
        commands = core.step(wakeup_s, Tick())
    assert assigned(commands) == [("late", "a")]
