"""Between OpenAI's JSON and the application layer: generation and models."""

from collections.abc import Mapping
from typing import Any

from lemix.errors import ErrorCode, LemixError
from lemix.v1 import cluster_service_pb2, types_pb2
from services.gateway.schemas import ChatBody, CompletionBody, GenerationBody, MessageBody
from services.gateway.types import Ending, GenerationRequest, Sampling, Turn
from services.gateway.validation import invalid

_FINISH = {types_pb2.FINISH_REASON_STOP: "stop", types_pb2.FINISH_REASON_LENGTH: "length"}


def completion_request(body: CompletionBody, headers: Mapping[str, str]) -> GenerationRequest:
    """Raises UNSUPPORTED for a batch of prompts, INVALID_REQUEST."""
    prompt = body.prompt
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise LemixError(ErrorCode.UNSUPPORTED, "one prompt per request; send several requests", param="prompt")
        prompt = prompt[0]
    text_or_tokens = prompt if isinstance(prompt, str) else tuple(i for i in prompt if isinstance(i, int))
    return _request(body, headers, text_or_tokens, body.max_tokens)


def chat_request(body: ChatBody, headers: Mapping[str, str]) -> GenerationRequest:
    """Raises UNSUPPORTED for content or roles we do not take, INVALID_REQUEST."""
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise invalid("give max_completion_tokens or max_tokens, not both", "max_completion_tokens")
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    return _request(body, headers, turns(body.messages), limit)


def turns(messages: list[MessageBody]) -> tuple[Turn, ...]:
    """Messages as turns; OpenAI's "developer" is the older "system"."""
    for index, message in enumerate(messages):
        if message.role in ("tool", "function"):
            raise LemixError(ErrorCode.UNSUPPORTED, "tool messages are not supported", param=f"messages.{index}.role")
    return tuple(Turn("system" if m.role == "developer" else m.role, m.text()) for m in messages)


def _request(
    body: GenerationBody,
    headers: Mapping[str, str],
    prompt: str | tuple[int, ...] | tuple[Turn, ...],
    max_tokens: int | None,
) -> GenerationRequest:
    body.check_extra()
    stop = body.stop if body.stop is not None else []
    return GenerationRequest(
        model=body.model,
        prompt=prompt,
        sampling=Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if body.temperature is None else float(body.temperature),
            top_p=1.0 if body.top_p is None else float(body.top_p),
            top_k=None if body.top_k in (None, 0, -1) else body.top_k,  # other servers write "no limit" as 0 or -1
            seed=None if body.seed is None else body.seed % 2**64,  # OpenAI takes negative seeds
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            ignore_eos=body.ignore_eos,
        ),
        request_id=body.lemix.request_id or headers.get("x-request-id", ""),
        session_id=body.lemix.session_id or headers.get("x-session-id", ""),
        slo_ttft_s=_seconds(body.lemix.slo.ttft_ms, headers, "x-slo-ttft-ms"),
        slo_tpot_s=_seconds(body.lemix.slo.tpot_ms, headers, "x-slo-tpot-ms"),
        reference=body.lemix.reference,
        reference_token_ids=tuple(body.lemix.reference_token_ids),
    )


def _seconds(value_ms: float | None, headers: Mapping[str, str], header: str) -> float | None:
    if value_ms is not None:
        return float(value_ms) / 1000
    text = headers.get(header)
    if text is None:
        return None
    try:
        return float(text) / 1000
    except ValueError:
        raise invalid(f"header {header} is not a number of milliseconds", header) from None


def finish_reason(ending: Ending) -> str:
    """OpenAI's word for why a generation ended."""
    return _FINISH[ending.finish_reason]


def usage(ending: Ending) -> dict[str, int]:
    """OpenAI's token counts."""
    return {
        "prompt_tokens": ending.prompt_tokens,
        "completion_tokens": ending.completion_tokens,
        "total_tokens": ending.prompt_tokens + ending.completion_tokens,
    }


def lemix_report(ending: Ending) -> dict[str, Any]:
    """Our extension of responses. Weight versions read node:incarnation:step."""
    report = ending.report
    return {
        "node_id": report.node_id,
        "weight_versions": [f"{v.node_id}:{v.incarnation}:{v.step}" for v in report.weight_versions],
        "staleness_s": report.staleness_s if report.HasField("staleness_s") else None,
        "reference_loss": report.reference_loss if report.HasField("reference_loss") else None,
        "ttft_s": ending.ttft_s,
    }


def model_object(model: cluster_service_pb2.Model) -> dict[str, Any]:
    """OpenAI's model object, with the context length other servers add."""
    return {
        "id": model.id,
        "object": "model",
        "created": int(model.created_unix_s),
        "owned_by": "lemix",
        "max_model_len": model.max_context_tokens,
    }
