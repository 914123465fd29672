"""What stage workers get for the ops the core decides."""

import math
from dataclasses import replace

import pytest

from services.latency import OpKind
from services.node_agent.core.types import Op
from services.node_agent.engine.base import StageResult
from services.node_agent.engine.handle import Handle
from services.node_agent.engine.inference_ops import Decode, DecodeSequence, Prefill, Sampling
from services.node_agent.engine.training_ops import Example, OptimizerSpec, OptimizerStep, TrainBackward, TrainForward
from services.node_agent.payloads import PayloadBuilder
from services.node_agent.tasks import MicrobatchTask, RequestTask, Task

SPEC = OptimizerSpec(learning_rate=0.5)


def _request(task_id: str, prompt: tuple[int, ...] = (1, 2)) -> RequestTask:
    return RequestTask(task_id, 0.0, prompt, Sampling(), 8)


def _microbatch(task_id: str, job_id: str = "job", spec: OptimizerSpec = SPEC) -> MicrobatchTask:
    return MicrobatchTask(task_id, job_id, 0, (Example((1, 2)),), spec, accumulation=2)


def _builder(*tasks: Task, num_stages: int = 2, states: int = 2) -> PayloadBuilder:
    return PayloadBuilder({task.task_id: task for task in tasks}, num_stages, states)


def _result(op: Op, **fields: object) -> StageResult:
    return StageResult(op.op_id, 0.0, 1.0, op.version, **fields)  # type: ignore[arg-type]


def test_a_batch_is_the_same_on_every_stage() -> None:
    task = _request("r")
    builder = _builder(task)
    task.generated_ids.append(9)
    op = Op(1, OpKind.DECODE, ("r",), 4)
    assert builder.build(op, 0) == Decode(1, 4, (DecodeSequence("r", 9, 2),))
    task.generated_ids.append(10)  # must not leak into an op that is on its way
    handle = Handle("h")
    builder.ended(op, 0, _result(op, output=handle))
    assert builder.build(op, 1) == Decode(1, 4, (DecodeSequence("r", 9, 2),), handle)
    builder.ended(op, 1, _result(op))
    assert builder._travelling == {}


def test_prefill_carries_prompt_reference_and_sampling() -> None:
    task = _request("r")
    task.reference_ids = (5, 6)
    payload = _builder(task).build(Op(1, OpKind.PREFILL, ("r",), 0), 0)
    assert isinstance(payload, Prefill)
    sequence = payload.sequences[0]
    assert (sequence.token_ids, sequence.reference_ids, sequence.max_tokens) == ((1, 2), (5, 6), 8)


def test_prefill_says_whose_kv_cache_a_turn_continues() -> None:
    op = Op(1, OpKind.PREFILL, ("new", "next"), 0, cached_tokens=(0, 1), continued=("", "ended"))
    payload = _builder(_request("new"), _request("next")).build(op, 0)
    assert isinstance(payload, Prefill)
    kept = [(sequence.request_id, sequence.cached_tokens, sequence.continues) for sequence in payload.sequences]
    assert kept == [("new", 0, ""), ("next", 1, "ended")]


def test_a_step_clips_by_the_sum_over_stages_and_dates_its_tasks() -> None:
    one, two = _microbatch("job/0"), _microbatch("job/1")
    builder = _builder(one, two)
    for op_id, task in ((1, one), (3, two)):
        forward = Op(op_id, OpKind.TRAIN_FORWARD, (task.task_id,), 7)
        payload = builder.build(forward, 0)
        assert isinstance(payload, TrainForward)
        assert payload.loss_scale == 0.5
        for stage in (0, 1):
            builder.ended(forward, stage, _result(forward, output=Handle(stage)))
        backward = Op(op_id + 1, OpKind.TRAIN_BACKWARD, (task.task_id,), 7)
        assert builder.build(backward, 1) == TrainBackward(op_id + 1, task.task_id)
        builder.ended(backward, 1, _result(backward, output=Handle("g"), grad_norm_sq=float(op_id)))
        assert builder.build(backward, 0) == TrainBackward(op_id + 1, task.task_id, Handle("g"))
        builder.ended(backward, 0, _result(backward, grad_norm_sq=10.0))
    step = Op(5, OpKind.OPTIMIZER_STEP, ("job/0", "job/1"), 7, subject="job", changes_weights=True)
    expected = OptimizerStep(5, 7, "job", SPEC, 3.0 + 10.0, oldest_version=0)
    assert builder.build(step, 0) == expected
    builder.ended(step, 0, _result(step))
    assert builder.build(step, 1) == expected, "one norm for all stages"
    builder.ended(step, 1, _result(step))
    assert (one.weight_step, two.weight_step) == (8, 8)
    assert builder._travelling == {}


def test_tied_embeddings_travel_between_the_ends_only() -> None:
    builder = _builder(_microbatch("job/0"), num_stages=3)
    forward = Op(1, OpKind.TRAIN_FORWARD, ("job/0",), 0)
    for stage in range(3):
        builder.build(forward, stage)
        builder.ended(forward, stage, _result(forward))
    backward = Op(2, OpKind.TRAIN_BACKWARD, ("job/0",), 0)
    gradients = []
    for stage in (2, 1, 0):
        payload = builder.build(backward, stage)
        assert isinstance(payload, TrainBackward)
        gradients.append((payload.gradient, payload.tied_gradient))
        tied = Handle("tied") if stage == 2 else None
        builder.ended(backward, stage, _result(backward, output=Handle(stage), tied_gradient=tied))
    assert gradients == [(None, None), (Handle(2), None), (Handle(1), Handle("tied"))]
    step = Op(3, OpKind.OPTIMIZER_STEP, ("job/0",), 0, subject="job", changes_weights=True)
    weights = []
    for stage in range(3):
        payload = builder.build(step, stage)
        assert isinstance(payload, OptimizerStep)
        weights.append(payload.tied_weight)
        builder.ended(step, stage, _result(step, output=Handle("embedding") if stage == 0 else None))
    assert weights == [None, None, Handle("embedding")]


def test_a_step_of_cancelled_microbatches_keeps_the_job_s_optimizer() -> None:
    task = _microbatch("job/0")
    builder = _builder(task)
    builder.build(Op(1, OpKind.TRAIN_FORWARD, ("job/0",), 0), 0)
    builder.drop("job/0")
    assert builder._travelling == {}
    del builder.tasks["job/0"]
    payload = builder.build(Op(2, OpKind.OPTIMIZER_STEP, (), 0, subject="job", changes_weights=True), 0)
    assert isinstance(payload, OptimizerStep)
    assert payload.optimizer == SPEC
    assert payload.grad_norm_sq_total is not None
    assert math.isnan(payload.grad_norm_sq_total), "no stage has a whole gradient: none may step"


def test_pieces_of_a_cut_microbatch() -> None:
    """The first takes what the other stage left, and only the last one leaves something."""
    builder = _builder(_microbatch("m"))

    def op(kind: OpKind, part: int) -> Op:
        return Op(int(kind is OpKind.TRAIN_BACKWARD), kind, ("m",), 3, subject="job", group=5, part=part, parts=2)

    first = builder.build(op(OpKind.TRAIN_FORWARD, 0), 0)
    examples = (Example((1, 2)),)
    assert first == TrainForward(0, 3, "m", examples, 0.5, None, 0, 2, "job", SPEC)
    builder.ended(op(OpKind.TRAIN_FORWARD, 0), 0, _result(op(OpKind.TRAIN_FORWARD, 0)))
    assert builder.build(op(OpKind.TRAIN_FORWARD, 1), 0) == TrainForward(0, 3, "m", examples, 0.5, None, 1, 2, "job")
    builder.ended(op(OpKind.TRAIN_FORWARD, 1), 0, _result(op(OpKind.TRAIN_FORWARD, 1), output=Handle("h")))
    assert builder.build(op(OpKind.TRAIN_FORWARD, 0), 1) == replace(first, hidden=Handle("h"))
    builder.ended(op(OpKind.TRAIN_FORWARD, 0), 1, _result(op(OpKind.TRAIN_FORWARD, 0)))
    builder.ended(op(OpKind.TRAIN_FORWARD, 1), 1, _result(op(OpKind.TRAIN_FORWARD, 1), loss=1.0))
    assert builder._travelling == {}

    for part in range(2):
        assert builder.build(op(OpKind.TRAIN_BACKWARD, part), 1) == TrainBackward(1, "m", None, None, 5, part)
        fields = {"output": Handle("g"), "tied_gradient": Handle("t"), "grad_norm_sq": 4.0} if part else {}
        builder.ended(op(OpKind.TRAIN_BACKWARD, part), 1, _result(op(OpKind.TRAIN_BACKWARD, part), **fields))
    assert builder.build(op(OpKind.TRAIN_BACKWARD, 0), 0) == TrainBackward(1, "m", Handle("g"), Handle("t"), 5, 0)
    builder.ended(op(OpKind.TRAIN_BACKWARD, 0), 0, _result(op(OpKind.TRAIN_BACKWARD, 0)))
    assert builder.build(op(OpKind.TRAIN_BACKWARD, 1), 0) == TrainBackward(1, "m", None, None, 5, 1)
    assert builder._gradients[5].norms_sq == [None, 4.0], "stage 0 has a part of its gradient"
    builder.ended(op(OpKind.TRAIN_BACKWARD, 1), 0, _result(op(OpKind.TRAIN_BACKWARD, 1), grad_norm_sq=2.0))
    assert builder._gradients[5].norms_sq == [2.0, 4.0]
    assert builder._travelling == {}


def test_failed_ops_stay_only_when_they_travel_on() -> None:
    builder = _builder(_request("r"), _microbatch("job/0"))
    prefill = Op(1, OpKind.PREFILL, ("r",), 0)
    builder.build(prefill, 0)
    builder.ended(prefill, 0, _result(prefill, error="RuntimeError: x"))
    assert builder._travelling == {}
    builder.build(Op(2, OpKind.TRAIN_FORWARD, ("job/0",), 0), 0)
    step = Op(3, OpKind.OPTIMIZER_STEP, ("job/0",), 0, subject="job", changes_weights=True)
    builder.build(step, 0)
    builder.ended(step, 0, _result(step, error="RuntimeError: x"))
    assert step.op_id in builder._travelling


def test_optimizer_states_are_bounded_without_touching_live_jobs() -> None:
    tasks = [_microbatch(f"{job}/0", job) for job in ("a", "b", "c")]
    builder = _builder(*tasks, states=1)
    for op_id, task in enumerate(tasks):
        builder.build(Op(op_id, OpKind.TRAIN_FORWARD, (task.task_id,), 0), 0)
    a, b, c = tasks
    assert builder.jobs_to_forget(a) == []
    for task, forgotten in ((b, ["b"]), (a, ["a"]), (c, [])):
        del builder.tasks[task.task_id]
        assert builder.jobs_to_forget(task) == forgotten


def test_a_micro_batch_knows_whether_its_job_began_with_a_new_optimizer() -> None:
    first, second = _microbatch("a/0", "a"), _microbatch("a/1", "a")
    builder = _builder(first, second)
    for op_id, task in enumerate((first, second)):
        builder.build(Op(op_id, OpKind.TRAIN_FORWARD, (task.task_id,), 0), 0)
    assert (first.fresh_optimizer, second.fresh_optimizer) == (True, False)
    restored, optimizers = _microbatch("a/0", "a"), builder.optimizers
    builder = _builder(restored)
    builder.adopt(optimizers)
    builder.build(Op(0, OpKind.TRAIN_FORWARD, (restored.task_id,), 0), 0)
    assert not restored.fresh_optimizer


def test_a_complete_job_s_optimizer_goes_at_once() -> None:
    first, last = _microbatch("a/0", "a"), _microbatch("a/1", "a")
    last.last = True
    builder = _builder(first, last)
    for op_id, task in enumerate((first, last)):
        builder.build(Op(op_id, OpKind.TRAIN_FORWARD, (task.task_id,), 0, subject="a"), 0)
    del builder.tasks["a/1"]
    assert builder.jobs_to_forget(last) == [], "an earlier one is still on its way"
    del builder.tasks["a/0"]
    assert builder.jobs_to_forget(first) == []
    assert builder.jobs_to_forget(last) == ["a"]


def test_a_job_whose_step_is_due_keeps_its_optimizer_until_the_step_left_the_last_stage() -> None:
    builder = _builder(_microbatch("a/0", "a"), _microbatch("b/0", "b"), states=1)
    backward = Op(2, OpKind.TRAIN_BACKWARD, ("a/0",), 0, subject="a")
    for op in (
        Op(1, OpKind.TRAIN_FORWARD, ("a/0",), 0, subject="a"),
        Op(3, OpKind.TRAIN_FORWARD, ("b/0",), 0, subject="b"),
    ):
        builder.build(op, 0)
    for stage in (1, 0):
        builder.build(backward, stage)
        builder.ended(backward, stage, _result(backward, grad_norm_sq=1.0))
    ended = _microbatch("a/0", "a")
    del builder.tasks["a/0"]  # cancelled after its backward: its group's step still comes
    assert builder.jobs_to_forget(ended) == []
    step = Op(4, OpKind.OPTIMIZER_STEP, (), 0, subject="a", changes_weights=True)
    for stage in (0, 1):
        assert builder.build(step, stage) == OptimizerStep(4, 0, "a", SPEC, 2.0, oldest_version=0)
        assert builder.jobs_to_forget(ended) == []
        builder.ended(step, stage, _result(step))
    assert builder.jobs_to_forget(ended) == ["a"]


def test_gradients_that_are_on_some_stages_only_are_dropped_on_all() -> None:
    builder = _builder(_microbatch("job/0"))
    builder.build(Op(1, OpKind.TRAIN_FORWARD, ("job/0",), 0, subject="job"), 0)
    backward = Op(2, OpKind.TRAIN_BACKWARD, ("job/0",), 0, subject="job")
    builder.build(backward, 1)
    builder.ended(backward, 1, _result(backward, grad_norm_sq=1.0))
    builder.drop("job/0")  # cancelled before stage 0 ran it
    step = Op(3, OpKind.OPTIMIZER_STEP, (), 0, subject="job", changes_weights=True)
    payload = builder.build(step, 0)
    assert isinstance(payload, OptimizerStep)
    assert payload.grad_norm_sq_total is not None
    assert math.isnan(payload.grad_norm_sq_total)


def test_gradients_of_two_groups_are_kept_apart() -> None:
    """The group opened second is complete first; the other one has lost a micro-batch on its way down."""
    one, two = _microbatch("a/0", "a"), _microbatch("b/0", "b")
    builder = _builder(one, two)
    for op_id, task in ((1, one), (3, two)):
        builder.build(Op(op_id, OpKind.TRAIN_FORWARD, (task.task_id,), 0, subject=task.job_id, group=op_id), 0)
    for op_id, stage in ((1, 1), (3, 1), (3, 0)):
        task_id, job_id = ("a/0", "a") if op_id == 1 else ("b/0", "b")
        backward = Op(op_id + 1, OpKind.TRAIN_BACKWARD, (task_id,), 0, subject=job_id, group=op_id)
        payload = builder.build(backward, stage)
        assert isinstance(payload, TrainBackward)
        assert payload.group == op_id
        builder.ended(backward, stage, _result(backward, grad_norm_sq=float(op_id)))
    builder.drop("a/0")
    steps = (
        (Op(5, OpKind.OPTIMIZER_STEP, ("b/0",), 0, subject="b", changes_weights=True, group=3), 6.0),
        (Op(6, OpKind.OPTIMIZER_STEP, (), 1, subject="a", changes_weights=True, oldest_version=1, group=1), math.nan),
    )
    for step, norm_sq in steps:
        for stage in (0, 1):
            payload = builder.build(step, stage)
            assert isinstance(payload, OptimizerStep)
            assert (payload.group, payload.oldest_version) == (step.group, step.oldest_version)
            assert payload.grad_norm_sq_total == pytest.approx(norm_sq, nan_ok=True)
            builder.ended(step, stage, _result(step))
    assert builder._gradients == {}


def test_a_job_s_optimizer_stays_while_any_of_its_groups_waits_for_its_step() -> None:
    builder = _builder(_microbatch("a/0", "a"))
    builder.build(Op(1, OpKind.TRAIN_FORWARD, ("a/0",), 0, subject="a", group=1), 0)
    for group in (1, 2):
        backward = Op(1 + group, OpKind.TRAIN_BACKWARD, ("a/0",), 0, subject="a", group=group)
        builder.build(backward, 1)
        builder.ended(backward, 1, _result(backward, grad_norm_sq=1.0))
    ended = _microbatch("a/0", "a")
    ended.last = True
    builder.tasks.clear()
    for group, forgotten in ((1, []), (2, ["a"])):
        step = Op(3 + group, OpKind.OPTIMIZER_STEP, (), group, subject="a", changes_weights=True, group=group)
        for stage in (0, 1):
            builder.build(step, stage)
            builder.ended(step, stage, _result(step))
        assert builder.jobs_to_forget(ended) == forgotten


def test_kinds_must_match_their_tasks() -> None:
    builder = _builder(_microbatch("job/0"), _request("r"))
    with pytest.raises(TypeError, match="job/0 is not an inference request"):
        builder.build(Op(1, OpKind.PREFILL, ("job/0",), 0), 0)
    with pytest.raises(TypeError, match="r is not a micro-batch"):
        builder.build(Op(2, OpKind.TRAIN_FORWARD, ("r",), 0), 0)
