"""The paper's forecast against hand-computed schedules (docs/scheduler.md; paper sections 4-5)."""

import pytest

from services.scheduler.core.forecast import NodeForecast

F, B = 1.0, 2.0


def with_training(num_stages: int = 2) -> NodeForecast:
    """A training task released at 0 alone on the node: forward 0-1, 1-2; backward 2-4 on the last stage, 4-6 on 0."""
    forecast = NodeForecast(num_stages)
    forecast.commit("t", 0.0, forecast.compute_idleness(0.0, [F] * num_stages), [B] * num_stages)
    return forecast


def windows(forecast: NodeForecast, stage: int) -> list[tuple[float, float]]:
    return [(window.begin_s, window.end_s) for window in forecast.stages[stage].backwards]


def forwards(forecast: NodeForecast, stage: int) -> dict[str, tuple[float, float]]:
    return {task_id: (w.begin_s, w.end_s) for task_id, w in forecast.stages[stage].forwards.items()}


def test_empty_node_charges_no_idleness_and_passes_every_stage() -> None:
    path = NodeForecast(3).compute_idleness(5.0, [1.0, 2.0, 3.0])
    assert path.idleness_s == 0.0
    assert path.forwards == ((5.0, 6.0), (6.0, 8.0), (8.0, 11.0))


def test_commit_of_training_lays_backwards_from_the_last_stage_down() -> None:
    forecast = with_training()
    assert forwards(forecast, 0) == {"t": (0.0, 1.0)}
    assert forwards(forecast, 1) == {"t": (1.0, 2.0)}
    assert windows(forecast, 1) == [(2.0, 4.0)]
    assert windows(forecast, 0) == [(4.0, 6.0)]


def test_worked_example_request_at_half_a_second() -> None:
    forecast = with_training()
    path = forecast.compute_idleness(0.5, [F, F])
    assert path.forwards == ((1.0, 2.0), (4.0, 5.0))
    assert path.idleness_s == 0.0
    assert path.end_s - 0.5 == 4.5
    assert forecast.gap_s(0.5) == 0.5


def test_worked_example_request_at_two_and_a_half_seconds() -> None:
    forecast = with_training()
    path = forecast.compute_idleness(2.5, [F, F])
    assert path.forwards == ((2.5, 3.5), (4.0, 5.0))
    assert path.idleness_s == 1.5
    assert path.end_s - 2.5 == 2.5
    assert forecast.gap_s(2.5) == 2.5


def test_request_that_does_not_fit_before_a_backward_waits_for_it() -> None:
    forecast = with_training()
    # Stage 0 is free 1-4: from 3.5 on a forward of 1 would collide with the backward 4-6.
    path = forecast.compute_idleness(3.5, [F, F])
    assert path.forwards[0] == (6.0, 7.0)
    # Idle on stage 0: 1-4, the backward is work. On stage 1 idle from 4 (backward end) to 7.
    assert path.idleness_s == pytest.approx(3.0 + 3.0)


def test_request_after_everything_counts_both_sides_of_the_backward_as_idle() -> None:
    path = with_training(1).compute_idleness(10.0, [F])
    # One stage: forward 0-1, backward 1-3, then idle 3-10.
    assert path.forwards == ((10.0, 11.0),)
    assert path.idleness_s == 7.0


def test_finished_work_still_counts_as_the_end_of_the_last_task() -> None:
    forecast = NodeForecast(1)
    forecast.commit("a", 0.0, forecast.compute_idleness(0.0, [F]))
    forecast.forward_ran(0, 0.0, 1.0, {"a": 0.0})
    forecast.ended("a", 1.0)
    assert forecast.stages[0].forwards == {}
    assert forecast.compute_idleness(3.0, [F]).idleness_s == 2.0


def test_real_trace_overwrites_and_what_follows_shifts() -> None:
    forecast = NodeForecast(1)
    for task_id in ("a", "b", "c"):
        forecast.commit(task_id, 0.0, forecast.compute_idleness(0.0, [F]))
    forecast.forward_ran(0, 0.0, 1.5, {"a": 0.0})
    assert forwards(forecast, 0) == {"b": (1.5, 2.5), "c": (2.5, 3.5)}
    assert forecast.stages[0].last_end_s == 3.5
    forecast.forward_ran(0, 1.5, 2.0, {"b": 0.0})
    assert forwards(forecast, 0) == {"c": (2.0, 3.0)}


def test_late_forward_pushes_the_rest_of_its_own_path_but_an_early_one_pulls_nothing() -> None:
    forecast = with_training()
    forecast.forward_ran(0, 0.0, 1.5, {"t": 0.0})
    assert forwards(forecast, 1) == {"t": (1.5, 2.5)}
    assert windows(forecast, 1) == [(2.5, 4.5)]
    assert windows(forecast, 0) == [(4.5, 6.5)]
    early = with_training()
    early.forward_ran(0, 0.0, 0.5, {"t": 0.0})
    assert forwards(early, 1) == {"t": (1.0, 2.0)}


def test_late_backward_shifts_what_comes_after_it_on_its_stage() -> None:
    forecast = with_training()
    forecast.commit("r", 0.5, forecast.compute_idleness(0.5, [F, F]))
    assert forwards(forecast, 1)["r"] == (4.0, 5.0)
    forecast.forward_ran(1, 1.0, 2.0, {"t": 0.0})
    forecast.backward_ran(1, "t", 2.0, 4.5)
    assert forwards(forecast, 1)["r"] == (4.5, 5.5)
    # Its own backward on stage 0 cannot begin before.
    assert windows(forecast, 0) == [(4.5, 6.5)]


def test_task_withdrawn_before_it_began_leaves_no_trace() -> None:
    forecast = NodeForecast(1)
    for task_id in ("a", "b", "c"):
        forecast.commit(task_id, 0.0, forecast.compute_idleness(0.0, [F]))
    forecast.ended("b", 0.5)
    assert forwards(forecast, 0) == {"a": (0.0, 1.0), "c": (1.0, 2.0)}
    assert forecast.stages[0].last_end_s == 2.0


def test_everything_withdrawn_is_as_if_nothing_ever_ran() -> None:
    forecast = NodeForecast(1)
    forecast.commit("a", 0.0, forecast.compute_idleness(1.0, [F]), [B])
    forecast.ended("a", 0.5)
    assert forecast.stages[0].last_end_s is None
    assert forecast.compute_idleness(9.0, [F]).idleness_s == 0.0


def test_cancelled_backward_frees_its_window() -> None:
    forecast = with_training(1)
    forecast.forward_ran(0, 0.0, 1.0, {"t": 0.0})
    forecast.ended("t", 1.0)
    assert windows(forecast, 0) == []
    assert forecast.compute_idleness(1.0, [F]).forwards == ((1.0, 2.0),)


def test_decode_iterations_lay_the_rest_of_batched_requests_one_after_the_other() -> None:
    forecast = NodeForecast(1)
    for task_id in ("a", "b"):
        forecast.commit(task_id, 0.0, forecast.compute_idleness(0.0, [1.0]))
    # Both are decoded together: the iteration ended at 0.4, "a" needs 0.3 more of the stage, "b" 0.2.
    forecast.decode_ran(0, 0.4, {"a": 0.3, "b": 0.2})
    assert forwards(forecast, 0)["a"][1] == pytest.approx(0.7)
    assert forwards(forecast, 0)["b"][1] == pytest.approx(0.9)
    # "b" ends first: only its own rest vanishes.
    forecast.ended("b", 0.5)
    assert forecast.stages[0].last_end_s == pytest.approx(0.7)


def test_memory_does_not_grow_with_finished_work() -> None:
    forecast = NodeForecast(2)
    now_s = 0.0
    for index in range(200):
        task_id = f"t{index}"
        path = forecast.compute_idleness(now_s, [F, F])
        forecast.commit(task_id, now_s, path, [B, B])
        for stage, (begin_s, end_s) in enumerate(path.forwards):
            forecast.forward_ran(stage, begin_s, end_s, {task_id: 0.0})
        forecast.backward_ran(1, task_id, path.end_s, path.end_s + B)
        forecast.backward_ran(0, task_id, path.end_s + B, path.end_s + 2 * B)
        now_s = path.end_s + 2 * B
        forecast.ended(task_id, now_s)
        assert sum(len(stage.forwards) + len(stage.backwards) for stage in forecast.stages) <= 4
