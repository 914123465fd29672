"""Protobuf <-> the agent's own types."""

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import profile_pb2, scheduler_service_pb2, work_pb2
from lemix.v1 import types_pb2
from services.latency import MOVES, OpKind
from services.node_agent.core.types import InferenceRequest, Op, TrainingMicrobatch
from services.node_agent.engine.base import ModelInfo, StageResult
from services.node_agent.engine.inference_ops import Logprobs, Sampling
from services.node_agent.engine.training_ops import AdapterSpec, Example, OptimizerSpec
from services.node_agent.tasks import MicrobatchTask, RequestTask, Task

OP_KIND_TO_PROTO = {
    OpKind.PREFILL: profile_pb2.OP_KIND_PREFILL,
    OpKind.DECODE: profile_pb2.OP_KIND_DECODE,
    OpKind.TRAIN_FORWARD: profile_pb2.OP_KIND_TRAIN_FORWARD,
    OpKind.TRAIN_BACKWARD: profile_pb2.OP_KIND_TRAIN_BACKWARD,
    OpKind.OPTIMIZER_STEP: profile_pb2.OP_KIND_OPTIMIZER_STEP,
    OpKind.WEIGHT_SYNC: profile_pb2.OP_KIND_WEIGHT_SYNC,
    OpKind.OFFLOAD: profile_pb2.OP_KIND_OFFLOAD,
    OpKind.RELOAD: profile_pb2.OP_KIND_RELOAD,
}
OP_KIND_FROM_PROTO = {value: kind for kind, value in OP_KIND_TO_PROTO.items()}

#: Ops that bring no task further.
_OF_NO_TASK = MOVES | {OpKind.OPTIMIZER_STEP, OpKind.WEIGHT_SYNC}

_FINISH_REASONS = {
    "stop": types_pb2.FINISH_REASON_STOP,
    "length": types_pb2.FINISH_REASON_LENGTH,
    "cancelled": types_pb2.FINISH_REASON_CANCELLED,
    "error": types_pb2.FINISH_REASON_ERROR,
}

# --------------------------------------------------------------------------- work in


def request_from_proto(
    task_id: str, work: work_pb2.InferenceWork, info: ModelInfo, *, now_s: float, now_unix_s: float
) -> tuple[RequestTask, InferenceRequest]:
    """A request for the agent and for its core. Raises LemixError when the model cannot run it.

    The core's times are the gateway's arrival on this node's monotonic clock, so that its promise counts from there.
    """
    sampling = work.sampling
    prompt, reference = tuple(work.prompt_token_ids), tuple(work.reference_token_ids)
    if not prompt or sampling.max_tokens < 1:
        raise LemixError(ErrorCode.INVALID_REQUEST, "a request needs a prompt token and max_tokens of at least 1")
    _check_tokens((*prompt, *reference, *sampling.logit_bias), info)
    longest = len(prompt) + max(sampling.max_tokens, len(reference))
    if longest > info.max_context_tokens:
        message = f"{longest} tokens do not fit the model's context of {info.max_context_tokens}"
        raise LemixError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, message)
    arrival_s = now_s - max(0.0, now_unix_s - work.arrival_unix_s) if work.arrival_unix_s else now_s
    ttft_s = work.slo.ttft_s if work.slo.HasField("ttft_s") else None
    if work.HasField("queue_ttft_s"):
        ttft_s = work.queue_ttft_s
    task = RequestTask(
        task_id=task_id,
        taken_s=now_s,
        prompt_ids=prompt,
        sampling=_sampling_from_proto(sampling),
        max_tokens=sampling.max_tokens,
        reference_ids=reference,
        adapter_id=work.adapter_id,
    )
    request = InferenceRequest(
        task_id=task_id,
        arrival_s=arrival_s,
        prompt_tokens=len(prompt),
        max_tokens=sampling.max_tokens,
        deadline_s=None if ttft_s is None else arrival_s + ttft_s,
        reference_tokens=len(reference),
        tpot_s=work.slo.tpot_s if work.slo.HasField("tpot_s") else None,
        # Keys and values that are kept for a session are of the adapter that made them.
        session_id=f"{work.adapter_id}/{work.session_id}" if work.adapter_id and work.session_id else work.session_id,
        choice_of=work.choice_of,
    )
    return task, request


def _sampling_from_proto(sampling: work_pb2.ResolvedSampling) -> Sampling:
    return Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p or 1.0,
        top_k=sampling.top_k,
        seed=sampling.seed,
        ignore_eos=sampling.ignore_eos,
        min_tokens=sampling.min_tokens,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=tuple(sorted(sampling.logit_bias.items())),
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
    )


def microbatch_from_proto(
    task_id: str,
    work: work_pb2.TrainingWork,
    info: ModelInfo,
    *,
    now_s: float,
    num_stages: int = 1,
    most_parts: int = 1,
) -> tuple[MicrobatchTask, TrainingMicrobatch]:
    """A micro-batch for the agent and for its core, cut into at most `most_parts` pieces, none of which is empty.

    Raises LemixError when the model cannot train on it.
    """
    if not work.examples:
        raise LemixError(ErrorCode.INVALID_REQUEST, "a micro-batch needs an example")
    examples = tuple(example_from_proto(example, info) for example in work.examples)
    accumulation = max(1, work.hyperparameters.gradient_accumulation_steps)
    adapter = None
    if work.HasField("lora"):
        adapter = adapter_from_proto(work.job_id, work.lora, isolated=work.isolated)
        _check_targets(adapter, info)
    task = MicrobatchTask(
        task_id=task_id,
        job_id=work.job_id,
        sequence=work.sequence,
        examples=examples,
        optimizer=optimizer_from_proto(work.hyperparameters, work.total_steps),
        accumulation=accumulation,
        last=work.last,
        adapter=adapter,
        attempt=work.attempt,
    )
    microbatch = TrainingMicrobatch(
        task_id=task_id,
        arrival_s=now_s,
        job_id=work.job_id,
        sequence=work.sequence,
        batch=len(examples),
        length=max(len(example.token_ids) for example in examples),
        accumulation=accumulation,
        last=work.last,
        parts=max(1, min(work.parts, most_parts, len(examples) * (info.num_layers // num_stages))),
    )
    return task, microbatch


def adapter_from_proto(adapter_id: str, lora: types_pb2.Lora, *, isolated: bool) -> AdapterSpec:
    """What an adapter is; the scheduler has filled the defaults in."""
    return AdapterSpec(adapter_id, lora.rank, lora.alpha, lora.dropout, tuple(lora.target_modules), isolated)


def _check_targets(adapter: AdapterSpec, info: ModelInfo) -> None:
    unknown = sorted(set(adapter.target_modules).difference(info.projections))
    if info.projections and unknown and adapter.target_modules != ("all-linear",):
        known = ", ".join(info.projections)
        message = f"the model has no projection {unknown[0]!r} to adapt; it has {known}, or all-linear"
        raise LemixError(ErrorCode.INVALID_REQUEST, message, param="lora.target_modules")


def adapter_to_proto(spec: AdapterSpec) -> scheduler_service_pb2.HeldAdapter:
    """For the scheduler."""
    lora = types_pb2.Lora(rank=spec.rank, alpha=spec.alpha, dropout=spec.dropout, target_modules=spec.target_modules)
    return scheduler_service_pb2.HeldAdapter(adapter_id=spec.adapter_id, lora=lora, isolated=spec.isolated)


def example_from_proto(example: work_pb2.TrainingExample, info: ModelInfo) -> Example:
    """A training example. Raises LemixError when it has no label or does not fit the model."""
    token_ids = tuple(example.token_ids)
    if len(token_ids) <= max(1, example.num_context_tokens):
        raise LemixError(ErrorCode.INVALID_REQUEST, "a training example has no token to learn")
    if len(token_ids) > info.max_context_tokens:
        message = f"a training example of {len(token_ids)} tokens exceeds the context of {info.max_context_tokens}"
        raise LemixError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, message)
    _check_tokens(token_ids, info)
    return Example(token_ids, example.num_context_tokens)


def optimizer_from_proto(parameters: types_pb2.Hyperparameters, total_steps: int) -> OptimizerSpec:
    """AdamW and its schedule; absent fields take the public API's defaults."""
    defaults = OptimizerSpec()
    has = parameters.HasField
    return OptimizerSpec(
        learning_rate=parameters.learning_rate if has("learning_rate") else defaults.learning_rate,
        lr_schedule=parameters.lr_schedule or defaults.lr_schedule,
        warmup_steps=parameters.warmup_steps,
        total_steps=total_steps,
        weight_decay=parameters.weight_decay,
        max_grad_norm=parameters.max_grad_norm if has("max_grad_norm") else defaults.max_grad_norm,
    )


def _check_tokens(token_ids: tuple[int, ...], info: ModelInfo) -> None:
    if max(token_ids) >= info.vocab_size:
        message = f"token {max(token_ids)} is outside the vocabulary of {info.vocab_size}"
        raise LemixError(ErrorCode.INVALID_REQUEST, message)


# --------------------------------------------------------------------------- results out


def outcome_to_proto(task: Task, reason: str, *, node_id: str, now_s: float) -> work_pb2.WorkOutcome:
    """The end of a task that ran here. reason: a `TaskDone.reason`."""
    outcome = work_pb2.WorkOutcome(task_id=task.task_id, node_id=node_id)
    if isinstance(task, RequestTask):
        outcome.inference.CopyFrom(_inference_outcome(task, reason, node_id, now_s))
    else:
        outcome.training.CopyFrom(_training_outcome(task, reason))
    return outcome


def logprobs_to_proto(logprobs: Logprobs) -> work_pb2.TokenLogprobs:
    """What is reported of one token."""
    return work_pb2.TokenLogprobs(
        logprob=logprobs.logprob,
        top_token_ids=[token_id for token_id, _ in logprobs.top],
        top_logprobs=[logprob for _, logprob in logprobs.top],
    )


def _inference_outcome(task: RequestTask, reason: str, node_id: str, now_s: float) -> work_pb2.InferenceOutcome:
    outcome = work_pb2.InferenceOutcome(
        finish_reason=_FINISH_REASONS[reason],
        token_ids=task.generated_ids,
        logprobs=task.logprobs,
        prompt_tokens=len(task.prompt_ids),
        report=types_pb2.ServingReport(weight_versions=task.weight_versions, node_id=node_id),
        node_response_s=now_s - task.taken_s,
    )
    if task.staleness_s is not None:
        outcome.report.staleness_s = task.staleness_s
    if task.reference_loss is not None:
        outcome.report.reference_loss = task.reference_loss
    if task.first_token_s is not None:
        outcome.node_ttft_s = task.first_token_s - task.taken_s
    error = _error_of(task, reason)
    if error is not None:
        outcome.error.CopyFrom(error.to_proto())
    return outcome


def _training_outcome(task: MicrobatchTask, reason: str) -> work_pb2.TrainingOutcome:
    outcome = work_pb2.TrainingOutcome(job_id=task.job_id, sequence=task.sequence)
    error = _error_of(task, reason)
    if error is not None:
        outcome.error.CopyFrom(error.to_proto())
        outcome.skipped = task.skipped and reason == "error"
        return outcome
    outcome.label_tokens = task.label_tokens
    outcome.weight_step = task.weight_step
    outcome.fresh_optimizer = task.fresh_optimizer
    if task.loss is not None:
        outcome.loss = task.loss
    return outcome


def _error_of(task: Task, reason: str) -> LemixError | None:
    if reason == "cancelled":
        return LemixError(ErrorCode.CANCELLED, "cancelled")
    if reason == "error":
        return task.error or LemixError(ErrorCode.INTERNAL, "the node failed to run it")
    return None


def public_error(error: str) -> str:
    """What may be told to whoever sent the work: numbers of arithmetic and value errors, else the error's type."""
    kind = error.partition(":")[0]
    return error[:200] if kind in ("ArithmeticError", "ValueError", "MemoryError", "OutOfMemoryError") else kind


def refusal_to_proto(item: work_pb2.WorkItem, error: LemixError, *, node_id: str) -> work_pb2.WorkOutcome:
    """The end of a task that never ran here."""
    outcome = work_pb2.WorkOutcome(task_id=item.task_id, node_id=node_id)
    if item.WhichOneof("work") == "training":
        outcome.training.job_id = item.training.job_id
        outcome.training.sequence = item.training.sequence
        outcome.training.error.CopyFrom(error.to_proto())
        return outcome
    cancelled = error.code is ErrorCode.CANCELLED
    outcome.inference.finish_reason = _FINISH_REASONS["cancelled" if cancelled else "error"]
    outcome.inference.prompt_tokens = len(item.inference.prompt_token_ids)
    outcome.inference.report.node_id = node_id
    outcome.inference.error.CopyFrom(error.to_proto())
    return outcome


def trace_to_proto(
    op: Op, stage: int, result: StageResult, *, is_last: bool, isolated: bool = False
) -> scheduler_service_pb2.OpTrace:
    """What the scheduler learns about a finished op. isolated: its job's adapter is no part of the served model."""
    return scheduler_service_pb2.OpTrace(
        stage=stage,
        op=OP_KIND_TO_PROTO[op.kind],
        begin_monotonic_s=result.begin_s,
        duration_s=result.end_s - result.begin_s,
        task_ids=() if op.kind in _OF_NO_TASK else op.task_ids,
        num_tokens=op.num_tokens,
        weight_step=op.version,
        first_token=op.kind is OpKind.PREFILL and is_last,
        context_tokens=op.context_tokens,
        part=op.part,
        parts=op.parts,
        partials=op.partials,
        decodes=op.decodes,
        decode_context_tokens=op.decode_context_tokens,
        isolated=isolated and op.kind is OpKind.OPTIMIZER_STEP,
        job_id=op.subject if op.kind is OpKind.OPTIMIZER_STEP else "",
    )
