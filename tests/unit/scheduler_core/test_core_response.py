"""Predicted TTFT and TPOT against hand-computed cases (constant prefill 0.1 s, decode iteration 0.01 s)."""

import pytest

from services.latency import LatencyModel, NodeLatency, OpKind
from services.scheduler.core.events import OpFinished, TaskArrived, TaskEnded
from services.scheduler.core.response import Response, predict_response
from services.scheduler.core.scheduler import SchedulerCore
from services.scheduler.core.state import LiveInference
from tests.unit.scheduler_core.support import core_with, microbatch, node, request


def predict(core: SchedulerCore, now_s: float = 1.0, **kwargs: object) -> Response:
    cluster = core._cluster
    live = LiveInference(request("new", arrival_s=now_s, **kwargs), 0, float("inf"))  # type: ignore[arg-type]
    return predict_response(now_s, live, cluster.nodes["a"], cluster)


def first_token(core: SchedulerCore, *task_ids: str, now_s: float = 1.0) -> None:
    core.step(now_s, OpFinished("a", 0, OpKind.PREFILL, now_s - 0.1, now_s, task_ids, 100, first_token=True))


def test_idle_node() -> None:
    assert predict(core_with(node("a"))) == Response(pytest.approx(0.1), pytest.approx(0.01))


def test_prompts_before_it_are_waited_for_until_their_first_token() -> None:
    core = core_with(node("a"))
    core.step(1.0, TaskArrived(request("r1", output=9)))
    assert predict(core).ttft_s == pytest.approx(0.2)
    first_token(core, "r1")
    # Now it decodes: the iteration that runs has to end.
    assert predict(core).ttft_s == pytest.approx(0.11)
    core.step(1.1, TaskEnded("r1", "a", ok=True, output_tokens=9))
    assert predict(core).ttft_s == pytest.approx(0.1)


def test_time_already_waited_counts() -> None:
    core = core_with(node("a"))
    cluster = core._cluster
    live = LiveInference(request("new", arrival_s=1.0), 0, float("inf"))
    assert predict_response(1.5, live, cluster.nodes["a"], cluster).ttft_s == pytest.approx(0.6)


def test_training_operation_blocks_an_idle_stage_but_not_between_decodes_of_one_stage() -> None:
    core = core_with(node("a"))
    core.step(0.0, TaskArrived(microbatch("m")))
    assert predict(core).ttft_s == pytest.approx(0.75 * 0.4 + 0.1)
    core.step(1.0, TaskArrived(request("r1", output=9)))
    first_token(core, "r1")
    assert predict(core).ttft_s == pytest.approx(0.01 + 0.1)


def test_training_operation_may_block_every_stage_of_a_pipeline() -> None:
    core = core_with(node("a", 2))
    core.step(0.0, TaskArrived(microbatch("m")))
    assert predict(core).ttft_s == pytest.approx(2 * 0.75 * 0.4 + 2 * 0.1)


def test_the_part_of_a_prefill_that_is_over_no_longer_counts() -> None:
    core = core_with(node("a", 2))
    core.step(0.0, TaskArrived(request("r1")))
    assert predict(core).ttft_s == pytest.approx(0.2 / 2 + 0.2)
    core.step(0.1, OpFinished("a", 0, OpKind.PREFILL, 0.0, 0.1, ("r1",), 100))
    assert predict(core).ttft_s == pytest.approx(0.1 / 2 + 0.2)


def test_full_batch_waits_for_a_place() -> None:
    core = core_with(node("a", max_batch=2), initial_output_tokens=10)
    for task_id in ("r1", "r2"):
        core.step(1.0, TaskArrived(request(task_id, output=10)))
    first_token(core, "r1", "r2")
    # One of two leaves every 10 / 2 iterations of 0.01 s.
    assert predict(core, output=10).ttft_s == pytest.approx(0.01 + 0.05 + 0.1)


def test_expected_prefills_stretch_the_time_per_token() -> None:
    core = core_with(node("a"))
    core.step(0.0, TaskArrived(request("r1")))
    core.step(0.5, TaskArrived(request("r2")))
    # A prefill of 0.1 s every 0.5 s: one in five iterations meets one, half of which is left.
    assert predict(core, now_s=0.5).tpot_s == pytest.approx(0.01 + 0.2 * 0.05)


def test_long_prefills_are_met_more_often() -> None:
    """The same mean with a spread: what is left of the prefill an iteration meets grows with its square."""

    def tpot_s(*prompts: int) -> float:
        per_token = LatencyModel("affine", (0.0, 0.001))
        constant = LatencyModel("constant", (0.01,))
        models = {OpKind.PREFILL: per_token, OpKind.DECODE: constant}
        core = core_with(node("a", latency=NodeLatency((models,))))
        for index, prompt in enumerate(prompts):
            core.step(0.5 * index, TaskArrived(request(f"r{index}", prompt=prompt)))
        return predict(core, now_s=0.5 * (len(prompts) - 1)).tpot_s

    assert tpot_s(100, 100, 100, 100) == pytest.approx(0.02)
    assert tpot_s(10, 190, 10, 190) > 0.025


def test_training_between_the_decodes_of_a_pipeline_stretches_the_time_per_token() -> None:
    core = core_with(node("a", 2))
    core.step(0.0, TaskArrived(microbatch("m")))
    # An iteration of 2 x 0.01 s meets half of a backward of 0.4 s on each stage.
    assert predict(core).tpot_s == pytest.approx(0.02 + 2 * 0.2)
