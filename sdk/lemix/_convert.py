"""Between the public dataclasses and lemix.v1 messages."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from lemix import types
from lemix.errors import ErrorCode, LemixError
from lemix.v1 import cluster_service_pb2 as cluster_pb
from lemix.v1 import inference_service_pb2 as inference_pb
from lemix.v1 import training_service_pb2 as training_pb
from lemix.v1 import types_pb2

Messages = Sequence[types.Message | tuple[str, str]]


def sampling(options: types.GenerationOptions) -> types_pb2.SamplingParams:
    """Raises LemixError INVALID_REQUEST for a number no message can carry."""
    stop = options.get("stop", ())
    try:
        return types_pb2.SamplingParams(
            max_tokens=options.get("max_tokens"),
            temperature=options.get("temperature", 1.0),
            top_p=options.get("top_p", 1.0),
            top_k=options.get("top_k"),
            seed=options.get("seed"),
            stop=[stop] if isinstance(stop, str) else stop,
            include_stop_str_in_output=options.get("include_stop_str_in_output", False),
            ignore_eos=options.get("ignore_eos", False),
            min_tokens=options.get("min_tokens", 0),
            presence_penalty=options.get("presence_penalty", 0.0),
            frequency_penalty=options.get("frequency_penalty", 0.0),
            logit_bias=options.get("logit_bias", {}),
            logprobs=options.get("logprobs"),
            n=options.get("n", 1),
        )
    except (ValueError, TypeError) as error:
        raise LemixError(ErrorCode.INVALID_REQUEST, f"unusable sampling parameter: {error}") from error


def slo(value: types.Slo | None) -> types_pb2.Slo | None:
    """None stays None: the cluster's default."""
    return None if value is None else types_pb2.Slo(ttft_s=value.ttft_s, tpot_s=value.tpot_s)


def chat_prompt(messages: Messages) -> types_pb2.ChatPrompt:
    """Turns, given as Message or (role, content)."""
    turns = [message if isinstance(message, types.Message) else types.Message(*message) for message in messages]
    return types_pb2.ChatPrompt(
        messages=[types_pb2.ChatMessage(role=turn.role, content=turn.content) for turn in turns]
    )


def set_prompt(spec: inference_pb.GenerationSpec, prompt: str | Sequence[int]) -> None:
    """Text, or token ids. Raises LemixError INVALID_REQUEST for anything else."""
    if isinstance(prompt, str):
        spec.text = prompt
        return
    try:
        spec.tokens.token_ids.extend(prompt)
    except (ValueError, TypeError) as error:
        raise LemixError(
            ErrorCode.INVALID_REQUEST, f"the prompt is neither text nor token ids: {error}", param="prompt"
        ) from error


def hyperparameters(value: types.Hyperparameters | None) -> types_pb2.Hyperparameters | None:
    """None stays None: the server's defaults. Raises LemixError INVALID_REQUEST for a number no message can carry."""
    if value is None:
        return None
    try:
        return types_pb2.Hyperparameters(**{name: v for name, v in asdict(value).items() if v is not None})
    except (ValueError, TypeError) as error:
        raise LemixError(ErrorCode.INVALID_REQUEST, f"unusable hyperparameter: {error}") from error


def generation(message: inference_pb.GenerateResponse) -> types.Generation:
    """A whole output."""
    return types.Generation(
        request_id=message.request_id,
        model=message.model,
        text=message.text,
        token_ids=tuple(message.token_ids),
        finish_reason=_finish_reason(message.finish_reason) or types.FinishReason.ERROR,
        usage=_usage(message.usage),
        report=_report(message.report),
        logprobs=_logprobs(message.logprobs),
        more_choices=tuple(map(_choice, message.more_choices)),
    )


def _choice(message: inference_pb.Choice) -> types.Choice:
    return types.Choice(
        text=message.text,
        token_ids=tuple(message.token_ids),
        finish_reason=_finish_reason(message.finish_reason) or types.FinishReason.ERROR,
        report=_report(message.report),
        logprobs=_logprobs(message.logprobs),
    )


def _logprobs(messages: Iterable[types_pb2.OutputLogprob]) -> tuple[types.OutputLogprob, ...]:
    return tuple(types.OutputLogprob(_token(item.chosen), tuple(map(_token, item.top))) for item in messages)


def _token(message: types_pb2.TokenLogprob) -> types.TokenLogprob:
    return types.TokenLogprob(message.token_id, message.token, message.logprob)


def generation_chunk(message: inference_pb.GenerateStreamResponse) -> types.GenerationChunk:
    """One piece of an output."""
    return types.GenerationChunk(
        request_id=message.request_id,
        model=message.model,
        text=message.text_delta,
        token_ids=tuple(message.token_ids),
        choice_index=message.choice_index,
        logprobs=_logprobs(message.logprobs),
        finish_reason=_finish_reason(message.finish_reason),
        usage=_usage(message.usage) if message.HasField("usage") else None,
        report=_report(message.report) if message.HasField("report") else None,
    )


def training_file(message: training_pb.CreateFileResponse) -> types.TrainingFile:
    """A stored file."""
    return types.TrainingFile(
        file_id=message.file_id,
        size_bytes=message.size_bytes,
        num_examples=message.num_examples,
        created_unix_s=message.created_unix_s,
        num_skipped=message.num_skipped,
        num_truncated=message.num_truncated,
    )


def job(message: types_pb2.TrainingJob) -> types.TrainingJob:
    """A job; a status this client does not know counts as running."""
    values = message.hyperparameters
    name = types_pb2.JobStatus.Name(message.status).removeprefix("JOB_STATUS_") if message.status in _STATUSES else ""
    return types.TrainingJob(
        job_id=message.job_id,
        model=message.model,
        training_file=message.training_file,
        status=types.JobStatus.__members__.get(name, types.JobStatus.RUNNING),
        created_unix_s=message.created_unix_s,
        finished_unix_s=message.finished_unix_s if message.HasField("finished_unix_s") else None,
        hyperparameters=types.Hyperparameters(**{field.name: value for field, value in values.ListFields()}),
        num_examples=message.num_examples,
        total_microbatches=message.total_microbatches,
        trained_microbatches=message.trained_microbatches,
        trained_tokens=message.trained_tokens,
        last_loss=message.last_loss if message.HasField("last_loss") else None,
        steps_per_node=dict(message.steps_per_node),
        unsaved_microbatches=message.unsaved_microbatches,
        validation_file=message.validation_file,
        heldout_loss=message.heldout_loss if message.HasField("heldout_loss") else None,
        best_heldout_loss=message.best_heldout_loss if message.HasField("best_heldout_loss") else None,
        best_checkpoint_id=message.best_checkpoint_id,
        skipped_microbatches=message.skipped_microbatches,
        method=_METHODS.get(message.method, types.TrainingMethod.FULL),
        mode=_MODES.get(message.mode, types.TrainingMode.ONLINE),
        lora=_lora(message.lora) if message.HasField("lora") else None,
        served_model=message.served_model,
        error=LemixError.from_proto(message.error) if message.HasField("error") else None,
    )


def _lora(message: types_pb2.Lora) -> types.Lora:
    return types.Lora(
        rank=message.rank, alpha=message.alpha, dropout=message.dropout, target_modules=tuple(message.target_modules)
    )


def lora(values: types.Lora | None) -> types_pb2.Lora | None:
    """Raises LemixError INVALID_REQUEST for a number outside its range."""
    if values is None:
        return None
    try:
        return types_pb2.Lora(
            rank=values.rank, alpha=values.alpha, dropout=values.dropout, target_modules=values.target_modules
        )
    except (TypeError, ValueError) as error:
        raise LemixError(ErrorCode.INVALID_REQUEST, f"lora: {error}", param="lora") from error


def mode(value: types.TrainingMode) -> types_pb2.TrainingMode:
    """The wire form."""
    return next(key for key, known in _MODES.items() if known is value)


def checkpoint_policy(policy: types.CheckpointPolicy | None) -> types_pb2.CheckpointPolicy | None:
    """Raises LemixError INVALID_REQUEST for a number outside its range."""
    if policy is None:
        return None
    try:
        return types_pb2.CheckpointPolicy(every_steps=policy.every_steps, every_s=policy.every_s)
    except (TypeError, ValueError) as error:
        raise LemixError(ErrorCode.INVALID_REQUEST, f"checkpoint: {error}", param="checkpoint") from error


def quality_gate(gate: types.QualityGate | None) -> types_pb2.QualityGate | None:
    """Raises LemixError INVALID_REQUEST for a number outside its range."""
    if gate is None:
        return None
    try:
        return types_pb2.QualityGate(
            tolerance=gate.tolerance, max_bad_evaluations=gate.max_bad_evaluations, publish=gate.publish
        )
    except (TypeError, ValueError) as error:
        raise LemixError(ErrorCode.INVALID_REQUEST, f"quality_gate: {error}", param="quality_gate") from error


def checkpoints(messages: Iterable[types_pb2.Checkpoint]) -> list[types.Checkpoint]:
    """Several checkpoints."""
    return [
        types.Checkpoint(
            checkpoint_id=message.checkpoint_id,
            node_id=message.node_id,
            created_unix_s=message.created_unix_s,
            size_bytes=message.size_bytes,
            trained_microbatches=dict(message.trained_microbatches),
            reason=message.reason,
            heldout_loss=message.heldout_loss if message.HasField("heldout_loss") else None,
        )
        for message in messages
    ]


def exported(message: training_pb.ExportCheckpointResponse) -> types.ExportedCheckpoint:
    """Where an export lies."""
    return types.ExportedCheckpoint(node_id=message.node_id, path=message.path)


def weight_version(message: types_pb2.WeightVersion) -> types.WeightVersion:
    """Identity of weights."""
    return types.WeightVersion(
        node_id=message.node_id, incarnation=message.incarnation, step=message.step, job_id=message.job_id
    )


def jobs(messages: Iterable[types_pb2.TrainingJob]) -> list[types.TrainingJob]:
    """Several jobs."""
    return [job(message) for message in messages]


def job_event(message: training_pb.WatchJobResponse) -> types.JobEvent:
    """An event and the job after it."""
    event = message.event
    return types.JobEvent(
        sequence=event.sequence,
        created_unix_s=event.created_unix_s,
        level=event.level,
        message=event.message,
        loss=event.loss if event.HasField("loss") else None,
        trained_microbatches=event.trained_microbatches,
        job=job(message.job),
    )


def receipt(message: training_pb.SubmitFeedbackResponse) -> types.FeedbackReceipt:
    """Where an example went."""
    return types.FeedbackReceipt(job_id=message.job_id, sequence=message.sequence)


def models(message: cluster_pb.ListModelsResponse) -> list[types.Model]:
    """The models served."""
    return [
        types.Model(
            model_id=model.id,
            max_context_tokens=model.max_context_tokens,
            created_unix_s=model.created_unix_s,
            parent=model.parent,
        )
        for model in message.models
    ]


def cluster_status(message: cluster_pb.GetStatusResponse) -> types.ClusterStatus:
    """Nodes and queues."""
    return types.ClusterStatus(
        policy=message.policy,
        ready=message.ready,
        not_ready_reason=message.not_ready_reason,
        nodes=tuple(
            types.NodeStatus(
                node_id=node.node_id,
                ready=node.ready,
                num_stages=node.num_stages,
                inflight_inference=node.inflight_inference,
                inflight_training=node.inflight_training,
                weight_step=node.weight_step,
                role=node.role,
                ops=tuple(_op_prediction(op) for op in node.ops),
            )
            for node in message.nodes
        ),
        waiting_inference=message.waiting_inference,
        waiting_training=message.waiting_training,
        predictions=tuple(
            types.PredictionError(
                predicted=item.predicted, beside_training=item.beside_training, count=item.count, error=item.error
            )
            for item in message.predictions
        ),
    )


def _op_prediction(message: cluster_pb.OpPrediction) -> types.OpPrediction:
    return types.OpPrediction(
        stage=message.stage,
        op=message.op,
        count=message.count,
        error=message.error if message.HasField("error") else None,
        error_beside=message.error_beside if message.HasField("error_beside") else None,
        ratio=message.ratio,
        interval=(message.interval_low, message.interval_high),
        drifting=message.drifting,
    )


_METHODS = {
    types_pb2.TRAINING_METHOD_FULL: types.TrainingMethod.FULL,
    types_pb2.TRAINING_METHOD_LORA: types.TrainingMethod.LORA,
}
_MODES = {
    types_pb2.TRAINING_MODE_ONLINE: types.TrainingMode.ONLINE,
    types_pb2.TRAINING_MODE_ISOLATED: types.TrainingMode.ISOLATED,
}
_STATUSES = frozenset(types_pb2.JobStatus.values())
_FINISH_REASONS = {
    types_pb2.FINISH_REASON_STOP: types.FinishReason.STOP,
    types_pb2.FINISH_REASON_LENGTH: types.FinishReason.LENGTH,
    types_pb2.FINISH_REASON_CANCELLED: types.FinishReason.CANCELLED,
    types_pb2.FINISH_REASON_ERROR: types.FinishReason.ERROR,
}


def _finish_reason(value: types_pb2.FinishReason) -> types.FinishReason | None:
    return _FINISH_REASONS.get(value)


def _usage(message: types_pb2.Usage) -> types.Usage:
    return types.Usage(prompt_tokens=message.prompt_tokens, completion_tokens=message.completion_tokens)


def _report(message: types_pb2.ServingReport) -> types.ServingReport:
    return types.ServingReport(
        node_id=message.node_id,
        weight_versions=tuple(weight_version(version) for version in message.weight_versions),
        staleness_s=message.staleness_s if message.HasField("staleness_s") else None,
        reference_loss=message.reference_loss if message.HasField("reference_loss") else None,
    )
