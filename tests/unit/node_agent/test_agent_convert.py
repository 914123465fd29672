"""Protobuf <-> the agent's types."""

from dataclasses import replace

import pytest

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import profile_pb2, work_pb2
from lemix.v1 import errors_pb2, types_pb2
from services.latency import OpKind
from services.node_agent.convert import (
    OP_KIND_FROM_PROTO,
    OP_KIND_TO_PROTO,
    example_from_proto,
    microbatch_from_proto,
    optimizer_from_proto,
    outcome_to_proto,
    refusal_to_proto,
    request_from_proto,
    trace_to_proto,
)
from services.node_agent.core.types import Op
from services.node_agent.engine.base import ModelInfo, StageResult
from services.node_agent.engine.inference_ops import Sampling
from services.node_agent.engine.training_ops import OptimizerSpec

INFO = ModelInfo(
    architecture="x", num_layers=1, vocab_size=50, max_context_tokens=10, num_parameters=0, eos_token_ids=()
)


def _work(**changes: object) -> work_pb2.InferenceWork:
    fields: dict[str, object] = {
        "prompt_token_ids": [1, 2, 3],
        "sampling": work_pb2.ResolvedSampling(max_tokens=4, temperature=0.5, top_p=0.9, top_k=7, seed=11),
        **changes,
    }
    return work_pb2.InferenceWork(**fields)  # type: ignore[arg-type]


def test_every_op_kind_has_a_name_on_the_wire() -> None:
    for kind in OpKind:
        assert profile_pb2.OpKind.Name(OP_KIND_TO_PROTO[kind]) == f"OP_KIND_{kind.name}"
        assert OP_KIND_FROM_PROTO[OP_KIND_TO_PROTO[kind]] is kind


def test_promises_count_from_the_arrival_at_the_gateway() -> None:
    work = _work(arrival_unix_s=1000.0, slo=types_pb2.Slo(ttft_s=2.0, tpot_s=0.1), reference_token_ids=[4])
    task, request = request_from_proto("r", work, INFO, now_s=50.0, now_unix_s=1000.5)
    assert (request.arrival_s, request.deadline_s, request.tpot_s) == (49.5, 51.5, 0.1)
    assert (request.prompt_tokens, request.max_tokens, request.reference_tokens) == (3, 4, 1)
    assert task.taken_s == 50.0
    assert request.session_id == ""
    assert task.sampling == Sampling(temperature=0.5, top_p=0.9, top_k=7, seed=11)


def test_a_place_in_the_queue_replaces_the_promise() -> None:
    work = _work(arrival_unix_s=1000.0, slo=types_pb2.Slo(ttft_s=2.0), queue_ttft_s=24.0)
    _, request = request_from_proto("r", work, INFO, now_s=50.0, now_unix_s=1000.0)
    assert request.deadline_s == 74.0


def test_the_core_learns_the_session() -> None:
    _, request = request_from_proto("r", _work(session_id="s"), INFO, now_s=50.0, now_unix_s=1000.0)
    assert request.session_id == "s"
    assert (request.choice_of, request.group) == ("", "r")


def test_a_further_choice_names_the_first_one() -> None:
    _, request = request_from_proto("r#1", _work(choice_of="r"), INFO, now_s=50.0, now_unix_s=1000.0)
    assert (request.choice_of, request.group) == ("r", "r")


@pytest.mark.parametrize("arrival_unix_s", [0.0, 2000.0])
def test_an_unknown_or_future_arrival_is_now(arrival_unix_s: float) -> None:
    _, request = request_from_proto("r", _work(arrival_unix_s=arrival_unix_s), INFO, now_s=50.0, now_unix_s=1000.0)
    assert (request.arrival_s, request.deadline_s, request.tpot_s) == (50.0, None, None)


@pytest.mark.parametrize(
    ("work", "code"),
    [
        (_work(prompt_token_ids=[]), ErrorCode.INVALID_REQUEST),
        (_work(sampling=work_pb2.ResolvedSampling()), ErrorCode.INVALID_REQUEST),
        (_work(prompt_token_ids=[50]), ErrorCode.INVALID_REQUEST),
        (_work(reference_token_ids=[50]), ErrorCode.INVALID_REQUEST),
        (_work(prompt_token_ids=[1] * 7), ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        (_work(reference_token_ids=[1] * 8), ErrorCode.CONTEXT_LENGTH_EXCEEDED),
    ],
)
def test_requests_the_model_cannot_run(work: work_pb2.InferenceWork, code: ErrorCode) -> None:
    with pytest.raises(LemixError) as caught:
        request_from_proto("r", work, INFO, now_s=0.0, now_unix_s=0.0)
    assert caught.value.code is code


def test_a_request_that_just_fits() -> None:
    work = _work(prompt_token_ids=[49] * 6)
    assert request_from_proto("r", work, INFO, now_s=0.0, now_unix_s=0.0)[1].prompt_tokens == 6


def test_microbatches_and_their_hyperparameters() -> None:
    hyperparameters = types_pb2.Hyperparameters(
        learning_rate=0.0, lr_schedule="cosine", warmup_steps=3, max_grad_norm=0.0, gradient_accumulation_steps=4
    )
    work = work_pb2.TrainingWork(
        job_id="job",
        sequence=9,
        examples=[
            work_pb2.TrainingExample(token_ids=[1, 2]),
            work_pb2.TrainingExample(token_ids=[1, 2, 3, 4], num_context_tokens=2),
        ],
        hyperparameters=hyperparameters,
        total_steps=20,
        attempt=2,
    )
    task, microbatch = microbatch_from_proto("job/9", work, INFO, now_s=1.0)
    assert (microbatch.batch, microbatch.length, microbatch.accumulation) == (2, 4, 4)
    assert not microbatch.last
    assert task.attempt == 2
    work.last = True
    assert microbatch_from_proto("job/9", work, INFO, now_s=1.0)[1].last
    assert (microbatch.job_id, microbatch.sequence) == (task.job_id, task.sequence) == ("job", 9)
    assert task.optimizer == OptimizerSpec(
        learning_rate=0.0, lr_schedule="cosine", warmup_steps=3, total_steps=20, max_grad_norm=0.0
    )
    assert optimizer_from_proto(types_pb2.Hyperparameters(), 0) == OptimizerSpec()


@pytest.mark.parametrize(
    ("wanted", "most", "stages", "expected"), [(0, 8, 1, 1), (3, 8, 1, 3), (9, 4, 1, 4), (64, 64, 1, 8), (64, 64, 2, 4)]
)
def test_microbatches_are_cut_into_as_many_pieces_as_there_is_work_for(
    wanted: int, most: int, stages: int, expected: int
) -> None:
    """Two examples through four layers: a stage has so many examples times its layers."""
    work = work_pb2.TrainingWork(parts=wanted, examples=[work_pb2.TrainingExample(token_ids=[1, 2])] * 2)
    info = replace(INFO, num_layers=4)
    _, microbatch = microbatch_from_proto("t", work, info, now_s=0.0, num_stages=stages, most_parts=most)
    assert microbatch.parts == expected


@pytest.mark.parametrize(("tokens", "context"), [([1], 0), ([1, 2], 2), ([1, 2, 50], 0), ([1] * 11, 0)])
def test_examples_the_model_cannot_learn_from(tokens: list[int], context: int) -> None:
    with pytest.raises(LemixError):
        example_from_proto(work_pb2.TrainingExample(token_ids=tokens, num_context_tokens=context), INFO)


@pytest.mark.parametrize(
    ("projections", "targets", "problem"),
    [
        (("k", "q"), ["q", "z", "y"], "the model has no projection 'y' to adapt; it has k, q, or all-linear"),
        (("k", "q"), ["all-linear", "q"], "the model has no projection 'all-linear' to adapt"),
        (("k", "q"), ["all-linear"], None),
        (("k", "q"), ["q", "k"], None),
        (("k", "q"), [], None),
        ((), ["z"], None),
    ],
)
def test_projections_of_adapters(projections: tuple[str, ...], targets: list[str], problem: str | None) -> None:
    info = replace(INFO, projections=projections)
    examples = [work_pb2.TrainingExample(token_ids=[1, 2])]
    work = work_pb2.TrainingWork(job_id="j", examples=examples, lora=types_pb2.Lora(rank=1, target_modules=targets))
    if problem is None:
        adapter = microbatch_from_proto("j/0", work, info, now_s=0.0)[0].adapter
        assert adapter is not None
        assert list(adapter.target_modules) == targets
        return
    with pytest.raises(LemixError, match=problem) as caught:
        microbatch_from_proto("j/0", work, info, now_s=0.0)
    assert (caught.value.code, caught.value.param) == (ErrorCode.INVALID_REQUEST, "lora.target_modules")


def test_outcomes_hold_what_was_measured_and_nothing_else() -> None:
    task, _ = request_from_proto("r", _work(), INFO, now_s=10.0, now_unix_s=0.0)
    empty = outcome_to_proto(task, "cancelled", node_id="n", now_s=11.0).inference
    assert not empty.HasField("node_ttft_s")
    assert not empty.report.HasField("staleness_s")
    assert not empty.report.HasField("reference_loss")
    assert empty.error.code == errors_pb2.ERROR_CODE_CANCELLED
    task.first_token_s, task.staleness_s, task.reference_loss = 10.5, 3.0, 0.0
    task.generated_ids = [7, 8]
    full = outcome_to_proto(task, "stop", node_id="n", now_s=12.0).inference
    assert (full.node_ttft_s, full.node_response_s) == (0.5, 2.0)
    assert (full.report.staleness_s, full.report.reference_loss, full.report.node_id) == (3.0, 0.0, "n")
    assert not full.HasField("error")
    failed = outcome_to_proto(task, "error", node_id="n", now_s=12.0).inference
    assert failed.error.code == errors_pb2.ERROR_CODE_INTERNAL


def test_refusals_keep_what_identifies_the_work() -> None:
    error = LemixError(ErrorCode.DEADLINE_EXCEEDED, "too late")
    training = work_pb2.WorkItem(task_id="j/3", training=work_pb2.TrainingWork(job_id="j", sequence=3))
    outcome = refusal_to_proto(training, error, node_id="n")
    assert (outcome.training.job_id, outcome.training.sequence) == ("j", 3)
    assert outcome.training.error.code == errors_pb2.ERROR_CODE_DEADLINE_EXCEEDED
    inference = work_pb2.WorkItem(task_id="r", inference=_work())
    refused = refusal_to_proto(inference, error, node_id="n").inference
    assert (refused.finish_reason, refused.prompt_tokens) == (types_pb2.FINISH_REASON_ERROR, 3)


def test_traces_name_tasks_only_where_the_contract_says() -> None:
    result = StageResult(1, 5.0, 5.25, 3)
    prefill = Op(1, OpKind.PREFILL, ("a", "b"), 2, num_tokens=7)
    assert trace_to_proto(prefill, 1, result, is_last=True).first_token
    assert not trace_to_proto(prefill, 0, result, is_last=False).first_token
    trace = trace_to_proto(Op(2, OpKind.OPTIMIZER_STEP, ("j/0",), 2), 0, result, is_last=False)
    assert list(trace.task_ids) == []
    assert (trace.weight_step, trace.begin_monotonic_s, trace.duration_s) == (2, 5.0, 0.25)
