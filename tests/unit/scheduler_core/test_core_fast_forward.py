"""Running a node ahead tells what the node then does, as long as nothing else comes."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.latency import LatencyModel, NodeLatency, OpKind
from services.node_agent.core.types import ASYNC, NodeCoreConfig
from services.scheduler.core import fast_forward
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import NodeJoined, OpFinished, TaskArrived, TaskCancelled, TaskEnded
from services.scheduler.core.fast_forward import predict_ahead
from services.scheduler.core.response import predict_response
from services.scheduler.core.scheduler import SchedulerCore
from services.scheduler.core.state import LiveInference
from services.scheduler.core.tasks import SloTarget
from services.simulator.cluster import Simulation
from services.simulator.types import Microbatch, Request, SimulationConfig, SimulationResult, VirtualNode, Work
from tests.unit.scheduler_core.support import core_with, microbatch, node, request

#: What is predicted holds for a request that is queued by its promise.
AHEAD = {"forecast": "fast_forward", "demotion": 0.0}
_FORMS = {
    OpKind.PREFILL: LatencyModel("full", (0.001, 1e-4, 1e-7)),
    OpKind.DECODE: LatencyModel("full_decode", (0.002, 0.001, 1e-5)),
    OpKind.TRAIN_FORWARD: LatencyModel("full", (0.001, 1.1e-4, 1e-7)),
    OpKind.TRAIN_BACKWARD: LatencyModel("full", (0.002, 2.3e-4, 2e-7)),
    OpKind.OPTIMIZER_STEP: LatencyModel("constant", (0.013,)),
}
#: Pieces of prompts of one length march in step over stages of one speed. What ends on two stages at the same time may
#: do so in either order, and what it starts depends on that: nobody can tell.
_SPEEDS = (1.0, 1.0173, 0.9791)


def _stage(speed: float) -> dict[OpKind, LatencyModel]:
    return {
        kind: LatencyModel(form.form, tuple(speed * factor for factor in form.coefficients))
        for kind, form in _FORMS.items()
    }


def simulate(
    work: Sequence[Work],
    node_values: dict[str, Any],
    *,
    nodes: int = 1,
    stages: int = 1,
    ttft_s: float = 1.0,
    **config: float,
) -> SimulationResult:
    """All work on nodes that can cut training, under a policy that runs them ahead."""
    core = NodeCoreConfig(num_stages=stages, **node_values)
    cluster = [
        VirtualNode(
            node_id=f"n{index}",
            latency=NodeLatency(tuple(map(_stage, _SPEEDS[:stages]))),
            core=core,
            max_training_parts=3,
        )
        for index in range(nodes)
    ]
    scheduler = CoreConfig(
        policy_options=AHEAD,
        default_slo=SloTarget(ttft_s=ttft_s, tpot_s=0.03),
        max_hold_back_s=0.0,
        max_inflight_training=64,
        # Nobody ends before the longest output: what is expected is what comes.
        initial_output_tokens=1 << 20,
    )
    return Simulation(SimulationConfig(core=scheduler, cut_overhead=0.0, **config), cluster, work).run()


def errors(result: SimulationResult) -> list[float]:
    """Difference of predicted and real TTFT in seconds, by arrival."""
    found = []
    for decision in result.decisions:
        record = result.tasks[decision.task_id]
        if isinstance(record.work, Request):
            assert record.first_token_s is not None
            (terms,) = [terms for terms in decision.terms if terms.node_id == decision.node_id]
            found.append(terms.response_s - (record.first_token_s - record.work.arrival_s))
    return found


requests = st.tuples(st.integers(0, 3000), st.integers(1, 700), st.integers(1, 12), st.sampled_from([None, 0.05, 2.0]))
microbatches = st.tuples(st.integers(0, 3000), st.integers(1, 700), st.sampled_from(["j", "k"]))
PLAIN = {
    "max_batch": 1,
    "max_prefill_tokens": 1,
    "kv_capacity_tokens": 1500,
    "max_inflight_training": 1,
    "weight_handling": "drain",
    "gradient_buffers": 1,
    "max_batch_tokens": 0,
    "kv_block_tokens": 1,
    "training_schedule": "async",
}


@settings(deadline=None, max_examples=150)
@given(
    asked=st.lists(requests, min_size=1, max_size=7),
    trained=st.lists(microbatches, max_size=8),
    stages=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    node_values=st.fixed_dictionaries(
        {
            "max_batch": st.sampled_from([1, 2, 16]),
            "max_prefill_tokens": st.sampled_from([1, 1000]),
            "kv_capacity_tokens": st.sampled_from([1500, 1 << 30]),
            "max_inflight_training": st.sampled_from([1, 4]),
            "weight_handling": st.sampled_from(["drain", "stash"]),
            "gradient_buffers": st.integers(1, 2),
            "max_batch_tokens": st.sampled_from([0, 0, 90, 300]),
            "kv_block_tokens": st.sampled_from([1, 16]),
            "training_schedule": st.sampled_from(["async", "async", "gpipe", "1f1b"]),
        }
    ),
    dispatch_s=st.sampled_from([0.0, 0.003]),
    report_s=st.sampled_from([0.0, 0.02]),
)
# The last micro-batch is sent before the first trace tells how long the way to the node is.
@example(
    asked=[(0, 1, 1, None)],
    trained=[(0, 1, "j"), (0, 1, "j"), (11, 297, "k")],
    stages=3,
    accumulation=1,
    node_values=PLAIN | {"max_batch_tokens": 90},
    dispatch_s=0.003,
    report_s=0.0,
)
# An operation ends while the last micro-batches are on their way.
@example(
    asked=[(1113, 73, 3, 2.0), (1113, 73, 3, 2.0)],
    trained=[
        (95, 39, "k"),
        (301, 382, "k"),
        (2048, 700, "j"),
        (2048, 700, "j"),
        (507, 314, "k"),
        (2435, 410, "j"),
        (2435, 410, "j"),
        (790, 94, "j"),
    ],
    stages=1,
    accumulation=2,
    node_values=PLAIN | {"weight_handling": "stash", "gradient_buffers": 2, "max_inflight_training": 4},
    dispatch_s=0.003,
    report_s=0.0,
)
def test_the_last_request_gets_its_first_token_when_predicted(
    asked: list[tuple[int, int, int, float | None]],
    trained: list[tuple[int, int, str]],
    stages: int,
    accumulation: int,
    node_values: dict[str, Any],
    dispatch_s: float,
    report_s: float,
) -> None:
    # Odd parts of a millisecond: what happens at the same time on two stages may happen in either order.
    is_synchronous = node_values["training_schedule"] != ASYNC
    work: list[Work] = []
    for i, (at, length, job) in enumerate(trained):
        # The scheduler keeps the next group of a job back until a synchronous node has ended the one before: that is
        # work that comes later, so there every group is a job of its own.
        group = sum(other == job for _, _, other in trained[:i]) // accumulation if is_synchronous else 0
        work.append(Microbatch(f"m{i}", at / 1000.0 + 1e-5 * i, f"{job}{group}", 1, length, accumulation))
    first = Request("first", 0.0, 100, 1, 1)
    work += [
        Request(f"r{i}", 0.5 + at / 1000.0 + 1.1e-5 * i, prompt, output, output, SloTarget(ttft_s=ttft_s))
        for i, (at, prompt, output, ttft_s) in enumerate(asked)
    ]
    last_s = max(item.arrival_s for item in work) + 0.01
    last = Request("last", last_s, 211, 3, 3)
    result = simulate([first, *work, last], node_values, stages=stages, dispatch_s=dispatch_s, report_s=report_s)
    assert all(result.tasks[item.task_id].assigned_s == item.arrival_s for item in work), "something comes later"
    assert errors(result)[-1] == pytest.approx(0.0, abs=1e-9)


def test_every_request_of_a_busy_node_is_predicted_when_later_ones_cannot_pass() -> None:
    work: list[Work] = [Request(f"r{i}", 0.013 * i, 100 + 37 * i % 300, 1, 1) for i in range(16)]
    result = simulate(work, {"max_batch": 1, "max_prefill_tokens": 1}, stages=2)
    assert max(abs(error) for error in errors(result)) < 1e-9


# ----------------------------------------------------------------------------- what it cannot know


def new_request(now_s: float, **kwargs: Any) -> LiveInference:
    return LiveInference(request("new", arrival_s=now_s, **kwargs), 0, float("inf"))


def both(core: SchedulerCore, now_s: float, **kwargs: Any) -> tuple[float, float]:
    """Predicted TTFT: run ahead, and by arithmetic."""
    live, found, cluster = new_request(now_s, **kwargs), core._cluster.nodes["a"], core._cluster
    return (
        predict_ahead(now_s, live, found, cluster).ttft_s,
        predict_response(now_s, live, found, cluster).ttft_s,
    )


def core_ahead(**bounds: int) -> SchedulerCore:
    return core_with(node("a", **bounds), policy_options=AHEAD, max_hold_back_s=0.0)


def test_the_rest_of_a_running_operation_is_known() -> None:
    core = core_ahead()
    core.step(0.0, TaskArrived(microbatch("m")))  # forward 0 - 0.2, backward 0.2 - 0.6
    core.step(0.2, OpFinished("a", 0, OpKind.TRAIN_FORWARD, 0.0, 0.2, ("m",)))
    ahead_s, arithmetic_s = both(core, 0.55)
    assert ahead_s == pytest.approx(0.05 + 0.1)
    assert arithmetic_s == pytest.approx(0.75 * 0.4 + 0.1)


def test_an_operation_that_is_overdue_ends_now() -> None:
    core = core_ahead()
    core.step(0.0, TaskArrived(microbatch("m")))
    assert both(core, 5.0)[0] == pytest.approx(0.1)


def test_who_waits_for_longer_than_is_run_ahead_is_predicted_by_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    core = core_ahead(max_batch=1)
    for index in range(20):
        core.step(0.0, TaskArrived(request(f"r{index}", ttft_s=10.0)))
    assert both(core, 0.05, ttft_s=10.0)[0] == pytest.approx(20 * 0.1 - 0.05 + 0.1)
    monkeypatch.setattr(fast_forward, "MAX_EVENTS", 15)
    ahead_s, arithmetic_s = both(core, 0.05, ttft_s=10.0)
    assert ahead_s == arithmetic_s


def test_requests_too_late_to_be_served_first_still_count_as_load() -> None:
    core = core_ahead(max_batch=1)
    for index in range(4):
        core.step(0.0, TaskArrived(request(f"r{index}", ttft_s=0.15)))
    found = core._cluster.nodes["a"]
    response = predict_ahead(0.05, new_request(0.05, ttft_s=0.5), found, core._cluster)
    # r0 runs, r1 starts at 0.1; r2 and r3 are too late at 0.2.
    assert (response.ttft_s, response.demoted_s) == (pytest.approx(0.25), pytest.approx(0.2))


@pytest.mark.parametrize(("fixed", "waits_s"), [(True, 0.1 + 99 * 0.01), (False, 0.1 + 4 * 0.01)])
def test_a_place_is_free_when_an_output_of_known_length_ends(fixed: bool, waits_s: float) -> None:
    core = core_with(node("a", max_batch=1), policy_options=AHEAD, max_hold_back_s=0.0, initial_output_tokens=5)
    core.step(0.0, TaskArrived(request("r", output=100, fixed_output=fixed)))
    assert both(core, 0.0)[0] == pytest.approx(waits_s + 0.1)


# ----------------------------------------------------------------------------- late news


def test_a_request_that_reached_the_node_later_than_thought_is_put_off() -> None:
    core = core_ahead()
    mirror = core._cluster.nodes["a"].mirror
    assert mirror is not None
    core.step(0.0, TaskArrived(microbatch("m")))  # forward 0 - 0.2, backward 0.2 - 0.6
    core.step(0.19, TaskArrived(request("r")))  # on time it would run before the backward
    core.step(0.2, OpFinished("a", 0, OpKind.TRAIN_FORWARD, 0.0, 0.2, ("m",)))
    core.step(0.6, OpFinished("a", 0, OpKind.TRAIN_BACKWARD, 0.2, 0.6, ("m",)))
    assert both(core, 0.65)[0] == pytest.approx(0.05 + 0.1)
    core.step(0.7, OpFinished("a", 0, OpKind.PREFILL, 0.6, 0.7, ("r",), 100, first_token=True))
    assert both(core, 0.7)[0] == pytest.approx(0.05 + 0.1), "the optimizer step runs"
    assert mirror.num_restarts == 0


def test_several_requests_are_put_off_one_after_the_other() -> None:
    core = core_ahead(max_batch=1)
    mirror = core._cluster.nodes["a"].mirror
    assert mirror is not None
    core.step(0.0, TaskArrived(microbatch("m")))
    for index in range(3):
        core.step(0.15 + 0.01 * index, TaskArrived(request(f"r{index}", ttft_s=10.0)))
    core.step(0.2, OpFinished("a", 0, OpKind.TRAIN_FORWARD, 0.0, 0.2, ("m",)))
    core.step(0.6, OpFinished("a", 0, OpKind.TRAIN_BACKWARD, 0.2, 0.6, ("m",)))
    assert both(core, 0.65, ttft_s=10.0)[0] == pytest.approx(0.05 + 2 * 0.1 + 0.1)
    assert mirror.num_restarts == 0


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_request_that_reached_the_node_sooner_than_any_before_is_put_forward(is_asked: bool) -> None:
    core = core_ahead()
    mirror = core._cluster.nodes["a"].mirror
    assert mirror is not None
    core.step(0.0, TaskArrived(request("q")))
    core.step(0.12, OpFinished("a", 0, OpKind.PREFILL, 0.02, 0.12, ("q",), 100, first_token=True))
    core.step(0.12, TaskEnded("q", "a", ok=True, output_tokens=1))
    core.step(1.0, TaskArrived(microbatch("m")))
    core.step(1.21, TaskArrived(request("r")))  # after as long a way it would come 0.01 s too late
    core.step(1.22, OpFinished("a", 0, OpKind.TRAIN_FORWARD, 1.02, 1.22, ("m",)))
    if is_asked:
        assert both(core, 1.3)[0] == pytest.approx(0.32 + 0.1), "the backward seems to run"
    core.step(1.32, OpFinished("a", 0, OpKind.PREFILL, 1.22, 1.32, ("r",), 100, first_token=True))
    assert both(core, 1.32)[0] == pytest.approx(0.4 + 0.1), "the backward runs now"
    core.step(1.72, OpFinished("a", 0, OpKind.TRAIN_BACKWARD, 1.32, 1.72, ("m",)))
    assert both(core, 1.72)[0] == pytest.approx(0.05 + 0.1), "the optimizer step runs"
    assert mirror.num_restarts == 0


def test_a_trace_that_took_long_once_is_forgotten() -> None:
    core = core_ahead()
    mirror = core._cluster.nodes["a"].mirror
    assert mirror is not None
    mirror.ran(1.0, OpFinished("a", 0, OpKind.OFFLOAD, 0.0, 0.4))
    for index in range(300):
        mirror.ran(2.0 + index, OpFinished("a", 0, OpKind.OFFLOAD, 1.0 + index, 1.98 + index))
    assert mirror.lag_s == pytest.approx(0.6)
    for index in range(300):
        mirror.ran(400.0 + index, OpFinished("a", 0, OpKind.OFFLOAD, 399.0 + index, 399.98 + index))
    assert mirror.lag_s == pytest.approx(0.02)


def test_operations_begin_a_hand_over_after_the_one_before() -> None:
    core = core_ahead(max_batch=1)
    mirror = core._cluster.nodes["a"].mirror
    assert mirror is not None
    for index in range(100):
        at_s = float(index)
        for name in ("q", "r"):
            core.step(at_s, TaskArrived(request(f"{name}{index}", ttft_s=10.0)))
        for name, begin_s in (("q", at_s + 0.004), ("r", at_s + 0.108)):
            trace = OpFinished(
                "a", 0, OpKind.PREFILL, begin_s, begin_s + 0.1, (f"{name}{index}",), 100, first_token=True
            )
            core.step(begin_s + 0.1, trace)
            core.step(begin_s + 0.1, TaskEnded(f"{name}{index}", "a", ok=True, output_tokens=1))
    assert (mirror.handover_s, mirror.delay_s) == (pytest.approx(0.004, rel=0.05), pytest.approx(0.0, abs=2e-4))
    core.step(200.0, TaskArrived(request("s")))
    assert both(core, 200.0)[0] == pytest.approx(2 * 0.104, rel=0.01)
    assert mirror.num_restarts == 0


# ----------------------------------------------------------------------------- starting again


def test_a_trace_that_nobody_expected_makes_it_start_again() -> None:
    core = core_ahead()
    mirror = core._cluster.nodes["a"].mirror
    assert mirror is not None
    core.step(0.0, TaskArrived(microbatch("m")))
    core.step(0.1, OpFinished("a", 0, OpKind.WEIGHT_SYNC, 0.0, 0.1))
    # The forward is taken to have begun after the synchronisation.
    assert both(core, 0.2)[0] == pytest.approx(0.1 + 0.1)
    assert mirror.num_restarts == 1
    core.step(0.3, OpFinished("a", 0, OpKind.TRAIN_FORWARD, 0.1, 0.3, ("m",)))
    assert both(core, 0.3)[0] == pytest.approx(0.4 + 0.1)
    assert mirror.num_restarts == 1, "it is in step again"


def test_who_decodes_goes_on_decoding_after_a_new_start() -> None:
    core = core_ahead()
    core.step(0.0, TaskArrived(request("r", output=9)))
    core.step(0.1, OpFinished("a", 0, OpKind.PREFILL, 0.0, 0.1, ("r",), 100, first_token=True))
    core.step(0.1, NodeJoined(node("a")))  # another profile, perhaps
    assert both(core, 0.105)[0] == pytest.approx(0.005 + 0.1)


def test_a_request_that_ended_unseen_does_not_run_on() -> None:
    core = core_ahead()
    core.step(0.0, TaskArrived(request("r", output=9)))
    core.step(0.1, OpFinished("a", 0, OpKind.PREFILL, 0.0, 0.1, ("r",), 100, first_token=True))
    assert both(core, 0.1)[0] == pytest.approx(0.11), "an iteration seems to run"
    core.step(0.1, TaskEnded("r", "a", ok=True, output_tokens=1))
    core.step(0.1, TaskArrived(request("s")))
    assert both(core, 0.11)[0] == pytest.approx(0.19)


def test_a_cancelled_request_leaves_its_place() -> None:
    core = core_ahead(max_batch=1)
    for task_id in ("r", "s"):
        core.step(0.0, TaskArrived(request(task_id)))
    core.step(0.05, TaskCancelled("s"))
    assert both(core, 0.05)[0] == pytest.approx(0.05 + 0.1)


def test_a_decode_iteration_without_some_of_its_requests_tells_that_they_ended() -> None:
    core = core_ahead()
    mirror = core._cluster.nodes["a"].mirror
    assert mirror is not None
    for task_id in ("r", "s"):
        core.step(0.0, TaskArrived(request(task_id, output=9)))
    core.step(0.1, OpFinished("a", 0, OpKind.PREFILL, 0.0, 0.1, ("r",), 100, first_token=True))
    core.step(0.2, OpFinished("a", 0, OpKind.PREFILL, 0.1, 0.2, ("s",), 100, first_token=True))
    core.step(0.21, OpFinished("a", 0, OpKind.DECODE, 0.2, 0.21, ("s",), 1))
    assert both(core, 0.21)[0] == pytest.approx(0.01 + 0.1)
    core.step(0.215, TaskEnded("r", "a", ok=True, output_tokens=1))
    assert both(core, 0.215)[0] == pytest.approx(0.005 + 0.1)
    assert mirror.num_restarts == 0
