"""Between lemix.v1 messages and the application layer."""

from lemix.internal.v1 import work_pb2
from lemix.v1 import inference_service_pb2 as inference_pb
from lemix.v1 import training_service_pb2 as training_pb
from lemix.v1 import types_pb2
from services.gateway.training_examples import ExampleBuilder
from services.gateway.types import (
    Choice,
    Generation,
    GenerationRequest,
    OutputLogprob,
    Piece,
    Sampling,
    TokenLogprob,
    Turn,
    Usage,
)
from services.gateway.validation import invalid


def generation_request(spec: inference_pb.GenerationSpec, timeout_s: float | None) -> GenerationRequest:
    """timeout_s: what is left of the call's deadline. Raises INVALID_REQUEST without a prompt."""
    return GenerationRequest(
        model=spec.model,
        prompt=_prompt(spec),
        sampling=_sampling(spec.sampling),
        request_id=spec.request_id,
        session_id=spec.session_id,
        slo_ttft_s=spec.slo.ttft_s if spec.slo.HasField("ttft_s") else None,
        slo_tpot_s=spec.slo.tpot_s if spec.slo.HasField("tpot_s") else None,
        reference=spec.reference if spec.HasField("reference") else None,
        n=spec.sampling.n or 1,
        max_staleness_s=spec.max_staleness_s if spec.HasField("max_staleness_s") else None,
        timeout_s=timeout_s,
    )


def generate_response(generation: Generation, model: str) -> inference_pb.GenerateResponse:
    """A whole output."""
    first, *others = generation.choices
    return inference_pb.GenerateResponse(
        request_id=generation.request_id,
        text=first.text,
        token_ids=first.token_ids,
        finish_reason=first.ending.finish_reason,
        usage=_usage(generation.usage),
        report=first.ending.report,
        model=model,
        logprobs=map(_logprob, first.logprobs),
        more_choices=map(_choice, others),
    )


def stream_response(piece: Piece, model: str) -> inference_pb.GenerateStreamResponse:
    """One piece of an output."""
    message = inference_pb.GenerateStreamResponse(
        request_id=piece.request_id,
        text_delta=piece.text,
        token_ids=piece.token_ids,
        model=model,
        choice_index=piece.choice_index,
        logprobs=map(_logprob, piece.logprobs),
    )
    if piece.ending is not None:
        message.finish_reason = piece.ending.finish_reason
        message.report.CopyFrom(piece.ending.report)
    if piece.usage is not None:
        message.usage.CopyFrom(_usage(piece.usage))
    return message


def feedback_example(request: training_pb.SubmitFeedbackRequest, examples: ExampleBuilder) -> work_pb2.TrainingExample:
    """Raises INVALID_REQUEST, UNSUPPORTED, CONTEXT_LENGTH_EXCEEDED."""
    form = request.WhichOneof("example")
    if form == "text":
        return examples.from_text(request.text)
    if form == "pair":
        return examples.from_pair(request.pair.prompt, request.pair.completion)
    if form == "chat":
        return examples.from_messages(_turns(request.chat))
    raise invalid("the example is missing", "example")


def create_file_response(file: work_pb2.FileRecord) -> training_pb.CreateFileResponse:
    """A stored file."""
    return training_pb.CreateFileResponse(
        file_id=file.file_id,
        size_bytes=file.size_bytes,
        num_examples=file.num_examples,
        created_unix_s=file.created_unix_s,
        num_skipped=file.num_skipped,
        num_truncated=file.num_truncated,
    )


def _prompt(spec: inference_pb.GenerationSpec) -> str | tuple[int, ...] | tuple[Turn, ...]:
    form = spec.WhichOneof("prompt")
    if form == "text":
        return spec.text
    if form == "tokens":
        return tuple(spec.tokens.token_ids)
    if form == "chat" and spec.chat.messages:
        return _turns(spec.chat)
    raise invalid("the prompt is missing", "prompt")


def _turns(chat: types_pb2.ChatPrompt) -> tuple[Turn, ...]:
    return tuple(Turn(message.role, message.content) for message in chat.messages)


def _sampling(params: types_pb2.SamplingParams) -> Sampling:
    return Sampling(
        max_tokens=params.max_tokens if params.HasField("max_tokens") else None,
        temperature=params.temperature if params.HasField("temperature") else 1.0,
        top_p=params.top_p if params.HasField("top_p") else 1.0,
        top_k=params.top_k if params.HasField("top_k") else None,
        seed=params.seed if params.HasField("seed") else None,
        stop=tuple(params.stop),
        include_stop_str_in_output=params.include_stop_str_in_output,
        ignore_eos=params.ignore_eos,
        min_tokens=params.min_tokens,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=dict(params.logit_bias),
        logprobs=params.logprobs if params.HasField("logprobs") else None,
    )


def _choice(choice: Choice) -> inference_pb.Choice:
    return inference_pb.Choice(
        text=choice.text,
        token_ids=choice.token_ids,
        finish_reason=choice.ending.finish_reason,
        report=choice.ending.report,
        logprobs=map(_logprob, choice.logprobs),
    )


def _logprob(logprob: OutputLogprob) -> types_pb2.OutputLogprob:
    return types_pb2.OutputLogprob(chosen=_token(logprob.chosen), top=map(_token, logprob.top))


def _token(token: TokenLogprob) -> types_pb2.TokenLogprob:
    return types_pb2.TokenLogprob(token_id=token.token_id, token=token.token, logprob=token.logprob)


def _usage(usage: Usage) -> types_pb2.Usage:
    return types_pb2.Usage(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)
