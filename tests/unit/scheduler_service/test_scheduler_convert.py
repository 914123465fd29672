"""Protobuf to the core's types."""

import dataclasses
from typing import Any

import pytest

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import profile_pb2, work_pb2
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.v1 import types_pb2
from services.latency import OpKind
from services.profile_messages import latency_from_profile
from services.runtime.config import ConfigError
from services.scheduler.config import CoreSettings, SchedulerSettings
from services.scheduler.convert import (
    ended_from_outcome,
    failed_outcome,
    ops_from_traces,
    queue_by,
    spec_from_hello,
    task_from_item,
)
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import TaskEnded
from services.scheduler.core.tasks import InferenceTask, SloTarget, TrainingTask


def fit(op: int, model: str, coefficients: list[float], stage: int = 0, chosen: bool = True) -> profile_pb2.LatencyFit:
    return profile_pb2.LatencyFit(stage=stage, op=op, model=model, coefficients=coefficients, chosen=chosen, mape=0.1)


def profile(*fits: profile_pb2.LatencyFit, num_stages: int = 1) -> profile_pb2.Profile:
    return profile_pb2.Profile(profile_id="p", num_stages=num_stages, fits=fits)


def test_chosen_fits_become_models() -> None:
    latency = latency_from_profile(
        profile(
            fit(profile_pb2.OP_KIND_PREFILL, "affine", [1.0, 0.5]),
            fit(profile_pb2.OP_KIND_PREFILL, "quadratic", [9.0], chosen=False),
            fit(profile_pb2.OP_KIND_DECODE, "full_decode", [1.0, 2.0, 3.0]),
            fit(profile_pb2.OP_KIND_TRAIN_FORWARD, "full", [1.0, 2.0, 3.0]),
        )
    )
    assert latency.op_s(0, OpKind.PREFILL, 2, 10) == 1.0 + 0.5 * 20
    assert latency.op_s(0, OpKind.DECODE, 2, 10) == 1.0 + 2.0 * 2 + 3.0 * 20  # a + b*C + c*C*l
    assert latency.op_s(0, OpKind.TRAIN_FORWARD, 2, 10) == 1.0 + 2.0 * 20 + 3.0 * 200
    assert latency.models[0][OpKind.PREFILL].mape == 0.1


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (profile(num_stages=0), "no stages"),
        (profile(num_stages=1), "no chosen fit for prefill on stage 0"),
        (profile(fit(profile_pb2.OP_KIND_PREFILL, "affine", [1.0, 1.0]), num_stages=2), "stage 1"),
        (profile(fit(profile_pb2.OP_KIND_PREFILL, "affine", [1.0, 1.0], stage=3)), "stage 3"),
        (profile(fit(profile_pb2.OP_KIND_PREFILL, "cubic", [1.0])), "cubic"),
        (profile(fit(profile_pb2.OP_KIND_PREFILL, "affine", [1.0])), "2 coefficients"),
    ],
)
def test_an_unusable_profile_says_why(bad: profile_pb2.Profile, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        latency_from_profile(bad)


def test_a_node_keeps_defaults_for_what_it_does_not_tell() -> None:
    latency = latency_from_profile(profile(fit(profile_pb2.OP_KIND_PREFILL, "constant", [1.0])))
    spec = spec_from_hello(pb.NodeHello(node_id="n", num_stages=1, max_context_tokens=128, max_batch=3), latency, 0.0)
    assert (spec.max_context_tokens, spec.max_batch, spec.max_inflight_inference) == (128, 3, 64)
    assert (spec.prefix_cache_tokens, spec.epoch_steps) == (0, 64)
    assert (spec.synchronous_training, spec.max_training_parts) == (False, 1)
    hello = pb.NodeHello(node_id="n", num_stages=1, prefix_cache_tokens=4096, epoch_steps=8)
    spec = spec_from_hello(hello, latency, 0.0)
    assert (spec.prefix_cache_tokens, spec.epoch_steps) == (4096, 8)
    assert (spec.max_prefill_tokens, spec.max_inflight_training) == (2048, 2)
    assert (spec.weight_handling, spec.gradient_buffers) == ("drain", 1)
    hello = pb.NodeHello(
        node_id="n",
        num_stages=1,
        max_prefill_tokens=512,
        max_inflight_training=4,
        weight_handling="stash",
        gradient_buffers=2,
    )
    spec = spec_from_hello(hello, latency, 0.0)
    assert (spec.max_prefill_tokens, spec.max_inflight_training) == (512, 4)
    assert (spec.weight_handling, spec.gradient_buffers) == ("stash", 2)
    with pytest.raises(ValueError, match="2 stages"):
        spec_from_hello(pb.NodeHello(node_id="n", num_stages=2), latency, 0.0)


@pytest.mark.parametrize(("schedule", "synchronous"), [("async", False), ("gpipe", True), ("1f1b", True)])
def test_a_node_tells_how_it_trains(schedule: str, synchronous: bool) -> None:
    latency = latency_from_profile(profile(fit(profile_pb2.OP_KIND_PREFILL, "constant", [1.0])))
    hello = pb.NodeHello(node_id="n", num_stages=1, training_schedule=schedule, max_training_parts=6)
    spec = spec_from_hello(hello, latency, 0.0)
    assert (spec.synchronous_training, spec.max_training_parts) == (synchronous, 6)


def test_pieces_of_training_keep_their_place() -> None:
    cut = pb.OpTrace(op=profile_pb2.OP_KIND_TRAIN_FORWARD, part=2, parts=3)
    whole = pb.OpTrace(op=profile_pb2.OP_KIND_TRAIN_FORWARD)
    assert [(op.part, op.parts) for op in ops_from_traces("n", [cut, whole], offset_s=0.0)] == [(2, 3), (0, 1)]


def test_traces_move_to_the_schedulers_clock() -> None:
    trace = pb.OpTrace(
        stage=1,
        op=profile_pb2.OP_KIND_DECODE,
        begin_monotonic_s=10.0,
        duration_s=0.5,
        task_ids=["a", "b"],
        num_tokens=2,
        context_tokens=7,
        weight_step=4,
        first_token=True,
    )
    (op,) = ops_from_traces("n", [trace, pb.OpTrace(op=99)], offset_s=90.0)
    assert (op.begin_s, op.end_s, op.op, op.stage) == (100.0, 100.5, OpKind.DECODE, 1)
    assert (op.task_ids, op.num_tokens, op.context_tokens, op.weight_step) == (("a", "b"), 2, 7, 4)
    assert op.first_token


def test_a_request_arrived_when_the_gateway_got_it() -> None:
    work = work_pb2.InferenceWork(
        prompt_token_ids=[1, 2, 3],
        sampling=work_pb2.ResolvedSampling(max_tokens=9),
        slo=types_pb2.Slo(ttft_s=0.5),
        session_id="s",
        arrival_unix_s=1000.0,
        choice_of="first",
    )
    item = work_pb2.WorkItem(task_id="r", inference=work)
    expected = InferenceTask("r", 47.0, 3, 9, SloTarget(ttft_s=0.5), "s", choice_of="first")
    assert task_from_item(item, now_s=50.0, now_unix_s=1003.0) == expected
    ahead = task_from_item(item, now_s=50.0, now_unix_s=990.0)
    assert ahead.arrival_s == 50.0  # a gateway's clock ahead of ours


@pytest.mark.parametrize(
    ("sampling", "is_fixed"),
    [
        ({"ignore_eos": True}, True),
        ({"ignore_eos": True, "stop": ["."]}, False),
        ({"min_tokens": 9, "stop": ["."]}, True),
        ({"min_tokens": 8}, False),
    ],
)
def test_an_output_that_nothing_can_end_early_is_fixed(sampling: dict[str, Any], is_fixed: bool) -> None:
    resolved = work_pb2.ResolvedSampling(max_tokens=9, **sampling)
    item = work_pb2.WorkItem(task_id="r", inference=work_pb2.InferenceWork(prompt_token_ids=[1], sampling=resolved))
    task = task_from_item(item, now_s=1.0, now_unix_s=0.0)
    assert isinstance(task, InferenceTask)
    assert task.fixed_output is is_fixed


def test_a_microbatch_is_as_long_as_its_longest_example() -> None:
    examples = [work_pb2.TrainingExample(token_ids=[0] * length) for length in (3, 7, 2)]
    work = work_pb2.TrainingWork(job_id="j", examples=examples)
    item = work_pb2.WorkItem(task_id="j/0", training=work)
    assert task_from_item(item, now_s=1.0, now_unix_s=0.0) == TrainingTask("j/0", 1.0, "j", 3, 7)
    item.training.lora.rank = 8
    assert task_from_item(item, now_s=1.0, now_unix_s=0.0) == TrainingTask("j/0", 1.0, "j", 3, 7, trains_adapter=True)
    with pytest.raises(ValueError, match="no work"):
        task_from_item(work_pb2.WorkItem(task_id="x"), now_s=0.0, now_unix_s=0.0)


def test_outcomes_end_tasks() -> None:
    served = work_pb2.InferenceOutcome(finish_reason=types_pb2.FINISH_REASON_LENGTH, token_ids=[1, 2])
    outcome = work_pb2.WorkOutcome(task_id="r", node_id="n", inference=served)
    assert ended_from_outcome(outcome) == TaskEnded("r", "n", ok=True, output_tokens=2)
    outcome.inference.finish_reason = types_pb2.FINISH_REASON_CANCELLED
    assert not ended_from_outcome(outcome).ok
    trained = work_pb2.WorkOutcome(task_id="j/0", node_id="n", training=work_pb2.TrainingOutcome(loss=1.5))
    assert ended_from_outcome(trained) == TaskEnded("j/0", "n", ok=True, loss=1.5)


def test_a_failed_outcome_carries_the_error() -> None:
    error = LemixError(ErrorCode.CANCELLED, "gone")
    item = work_pb2.WorkItem(task_id="r", inference=work_pb2.InferenceWork(prompt_token_ids=[1, 2]))
    outcome = failed_outcome(item, error).inference
    assert outcome.finish_reason == types_pb2.FINISH_REASON_CANCELLED
    assert (outcome.prompt_tokens, outcome.error.message) == (2, "gone")
    late = LemixError(ErrorCode.DEADLINE_EXCEEDED, "late")
    assert failed_outcome(item, late).inference.finish_reason == types_pb2.FINISH_REASON_ERROR
    training = work_pb2.WorkItem(task_id="j/4", training=work_pb2.TrainingWork(job_id="j", sequence=4))
    assert failed_outcome(training, error).training.sequence == 4


def test_every_knob_of_the_core_can_be_set_and_has_its_default() -> None:
    assert {field.name for field in dataclasses.fields(CoreConfig)} == set(CoreSettings.model_fields)
    assert CoreSettings().to_core() == CoreConfig()
    assert CoreSettings.model_validate({"sync_every_steps": -1}).to_core().sync_every_steps == 0
    with pytest.raises(ConfigError, match="max_waiting_inference"):
        CoreSettings.model_validate({"max_waiting_inference": 0}).to_core()
    assert SchedulerSettings().node_lease_s == 5.0


def test_a_node_tells_its_process_and_when_its_weights_were_trained() -> None:
    latency = latency_from_profile(profile(fit(profile_pb2.OP_KIND_PREFILL, "constant", [1.0])))
    new = pb.NodeHello(node_id="n", num_stages=1, checkpoints=[types_pb2.Checkpoint(checkpoint_id="n:1:5")])
    back = pb.NodeHello(node_id="n", num_stages=1, incarnation=3, sent_monotonic_s=50.0, weights_age_s=20.0)
    specs = [spec_from_hello(hello, latency, 100.0) for hello in (new, back)]
    assert [(spec.incarnation, spec.trained_s) for spec in specs] == [(0, None), (3, 130.0)]


@pytest.mark.parametrize("given", [
    {"sync": "none"},
    {"sync": "average", "sync_every_steps": 10},
    {"sync": "checkpoint", "sync_every_steps": 100},
    {"sync": "average", "sync_every_steps": -1},
    {"sync_every_steps": 3},
])  # fmt: skip
def test_synchronisation_can_be_chosen(given: dict[str, object]) -> None:
    core = CoreSettings.model_validate(given).to_core()
    assert (core.sync, core.sync_every_steps) == (given.get("sync", "policy"), max(0, given.get("sync_every_steps", 0)))


@pytest.mark.parametrize(("given", "problem"), [
    ({"sync": "none", "sync_every_steps": 5}, 'core.sync_every_steps must be 0 with core.sync "none", got 5'),
    ({"sync": "average"}, 'core.sync "average" needs core.sync_every_steps'),
    ({"sync": "checkpoint", "sync_every_steps": 0}, 'core.sync "checkpoint" needs core.sync_every_steps'),
])  # fmt: skip
def test_a_choice_that_contradicts_its_interval_is_refused(given: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        CoreSettings.model_validate(given).to_core()


@pytest.mark.parametrize(
    ("deadline_unix_s", "queued_by_s"), [(0.0, 24.0), (1100.0, 24.0), (1020.0, 10.0), (900.0, 0.0)]
)
def test_who_lets_others_pass_comes_up_while_its_client_still_waits(deadline_unix_s: float, queued_by_s: float) -> None:
    work = work_pb2.InferenceWork(arrival_unix_s=1000.0, deadline_unix_s=deadline_unix_s)
    queue_by(work, 24.0)
    assert work.queue_ttft_s == queued_by_s
    queue_by(work, None)
    assert not work.HasField("queue_ttft_s")
