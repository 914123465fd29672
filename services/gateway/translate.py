"""Between OpenAI's JSON and the application layer: generation and models."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from lemix.errors import ErrorCode, LemixError
from lemix.v1 import cluster_service_pb2, types_pb2
from services.gateway.schemas import ChatBody, CompletionBody, GenerationBody, MessageBody
from services.gateway.types import Ending, GenerationRequest, OutputLogprob, Sampling, TokenLogprob, Turn, Usage
from services.gateway.validation import MAX_LOGPROBS, invalid

_FINISH = {types_pb2.FINISH_REASON_STOP: "stop", types_pb2.FINISH_REASON_LENGTH: "length"}


def completion_request(body: CompletionBody, headers: Mapping[str, str]) -> GenerationRequest:
    """Raises UNSUPPORTED for a batch of prompts, INVALID_REQUEST."""
    prompt = body.prompt
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise LemixError(ErrorCode.UNSUPPORTED, "one prompt per request; send several requests", param="prompt")
        prompt = prompt[0]
    text_or_tokens = prompt if isinstance(prompt, str) else tuple(i for i in prompt if isinstance(i, int))
    return _request(body, headers, text_or_tokens, body.max_tokens, body.logprobs)


def chat_request(body: ChatBody, headers: Mapping[str, str]) -> GenerationRequest:
    """Raises UNSUPPORTED for content or roles we do not take, INVALID_REQUEST."""
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise invalid("give max_completion_tokens or max_tokens, not both", "max_completion_tokens")
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    return _request(body, headers, turns(body.messages), limit, _chat_logprobs(body))


def _chat_logprobs(body: ChatBody) -> int | None:
    if not body.logprobs:
        if body.top_logprobs:
            raise invalid("top_logprobs needs logprobs", "top_logprobs")
        return None
    wanted = body.top_logprobs or 0
    if not 0 <= wanted <= MAX_LOGPROBS:
        raise invalid(f"top_logprobs must be in [0, {MAX_LOGPROBS}], not {wanted}", "top_logprobs")
    return wanted


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
    logprobs: int | None,
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
            include_stop_str_in_output=bool(body.include_stop_str_in_output),
            ignore_eos=bool(body.ignore_eos),
            min_tokens=body.min_tokens or 0,
            presence_penalty=float(body.presence_penalty or 0.0),
            frequency_penalty=float(body.frequency_penalty or 0.0),
            logit_bias=_logit_bias(body.logit_bias or {}),
            logprobs=logprobs,
        ),
        n=1 if body.n is None else body.n,
        request_id=body.lemix.request_id or headers.get("x-request-id", ""),
        session_id=body.lemix.session_id or headers.get("x-session-id", ""),
        slo_ttft_s=_seconds(body.lemix.slo.ttft_ms, headers, "x-slo-ttft-ms"),
        slo_tpot_s=_seconds(body.lemix.slo.tpot_ms, headers, "x-slo-tpot-ms"),
        reference=body.lemix.reference,
        reference_token_ids=tuple(body.lemix.reference_token_ids),
        max_staleness_s=_max_staleness_s(body.lemix.max_staleness_s, headers),
    )


def _logit_bias(biases: Mapping[str, float]) -> dict[int, float]:
    """OpenAI's keys are token ids as strings."""
    found = {}
    for key, bias in biases.items():
        if not (key.isascii() and key.isdecimal()):
            raise invalid(f"logit_bias: {key[:50]!r} is not a token id", "logit_bias")
        found[int(key[:20])] = float(bias)
    return found


def _max_staleness_s(value_s: float | None, headers: Mapping[str, str]) -> float | None:
    text = headers.get("x-max-staleness")
    if value_s is not None or text is None:
        return None if value_s is None else float(value_s)
    try:
        seconds = float(text)
    except ValueError:
        raise invalid("header x-max-staleness is not a number of seconds", "x-max-staleness") from None
    if not 0 < seconds < math.inf:
        raise invalid("header x-max-staleness must be positive", "x-max-staleness")
    return seconds


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


def usage(counts: Usage) -> dict[str, int]:
    """OpenAI's token counts."""
    return {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
        "total_tokens": counts.prompt_tokens + counts.completion_tokens,
    }


def chat_logprobs(tokens: Sequence[OutputLogprob]) -> dict[str, Any]:
    """OpenAI's form for chats."""
    return {
        "content": [
            {**_chat_logprob(token.chosen), "top_logprobs": [_chat_logprob(top) for top in token.top]}
            for token in tokens
        ],
        "refusal": None,
    }


def _chat_logprob(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": token.logprob, "bytes": list(token.token.encode())}


def completion_logprobs(tokens: Sequence[OutputLogprob], offset: int) -> dict[str, Any]:
    """OpenAI's older form. offset: characters of the tokens before."""
    offsets = accumulate((len(token.chosen.token) for token in tokens), initial=offset)
    return {
        "text_offset": list(offsets)[:-1],
        "token_logprobs": [token.chosen.logprob for token in tokens],
        "tokens": [token.chosen.token for token in tokens],
        # The token itself is always among them, as OpenAI has it.
        "top_logprobs": [
            {top.token: top.logprob for top in (*token.top, token.chosen)} if token.top else None for token in tokens
        ],
    }


def lemix_report(ending: Ending) -> dict[str, Any]:
    """Our extension of responses."""
    report = ending.report
    return {
        "node_id": report.node_id,
        "weight_versions": [
            {"job_id": v.job_id or None, "node_id": v.node_id, "incarnation": v.incarnation, "step": v.step}
            for v in report.weight_versions
        ],
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
        **({"parent": model.parent} if model.parent else {}),
    }
