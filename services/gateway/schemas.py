"""Bodies of the REST API. Names and ranges are OpenAI's; `lemix` objects are our extensions."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from lemix.errors import ErrorCode, LemixError
from services.gateway.validation import invalid

Number = StrictFloat | StrictInt

#: Parameters that OpenAI, or other servers of its API, define and we do not support, with the values that ask for
#: nothing (null always does). Sent with those they are ignored; with any other value they are refused by name.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,), "echo": (False,), "suffix": ("",), "top_logprobs": (0,), "prompt_logprobs": (),
    "repetition_penalty": (1,), "min_p": (0,), "tools": ([],), "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (),
    "reasoning_effort": (), "verbosity": (), "web_search_options": (), "store": (False,), "moderation": (),
    "service_tier": ("auto", "default"), "use_beam_search": (False,), "skip_special_tokens": (True,),
    "seed": (), "integrations": ([],), "metadata": ({},), "expires_after": (),
}  # fmt: skip
#: Parameters that say something about the caller, not about the answer: taken and ignored.
_IGNORED = frozenset(
    {"user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"}
)


class Body(BaseModel):
    """A request body: strict types; what is not declared lands in `model_extra` and is judged by `check_extra`."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)

    def check_extra(self) -> None:
        """Raises UNSUPPORTED for a known parameter at a value we cannot honour, INVALID_REQUEST for an unknown one."""
        for name, value in (self.model_extra or {}).items():
            if name in _IGNORED:
                continue
            if name not in _UNSUPPORTED:
                raise invalid(f"unknown parameter {name[:100]!r}", name[:100])
            if value is not None and not any(value == default for default in _UNSUPPORTED[name]):
                raise LemixError(ErrorCode.UNSUPPORTED, f"{name} is not supported at this value", param=name)


class Strict(BaseModel):
    """A nested object in which every unknown key is an error."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class SloBody(Strict):
    """Response-time promise, milliseconds."""

    ttft_ms: Number | None = None
    tpot_ms: Number | None = None


#: Defaults are frozen and shared: pydantic would copy one in depth for every request.
_NO_SLO = SloBody()


class LemixOptions(Strict):
    """Our extension of generation requests."""

    reference: StrictStr | None = None
    reference_token_ids: list[StrictInt] = []
    max_staleness_s: Number | None = None
    slo: SloBody = Field(default_factory=lambda: _NO_SLO)
    session_id: StrictStr = ""
    request_id: StrictStr = ""


_NO_OPTIONS = LemixOptions()


class StreamOptions(Strict):
    """What a stream carries besides text."""

    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None


class TextPart(Strict):
    """One part of a message's content."""

    type: Literal["text"]
    text: StrictStr


class MessageBody(Strict):
    """One message. `name` and the null fields that clients echo are taken and ignored."""

    role: StrictStr
    content: StrictStr | list[TextPart] | None = None
    name: StrictStr | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class GenerationBody(Body):
    """What both kinds of generation share."""

    model: StrictStr
    max_tokens: StrictInt | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    seed: StrictInt | None = None
    stop: StrictStr | list[StrictStr] | None = None
    include_stop_str_in_output: StrictBool | None = None
    min_tokens: StrictInt | None = None
    ignore_eos: StrictBool | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[StrictStr, Number] | None = None
    n: StrictInt | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    lemix: LemixOptions = Field(default_factory=lambda: _NO_OPTIONS)


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: StrictStr | list[StrictInt] | list[StrictStr] | list[list[StrictInt]]
    logprobs: StrictInt | None = None


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[MessageBody], Field(min_length=1)]
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = None


class HyperparametersBody(Strict):
    """OpenAI's hyperparameters."""

    n_epochs: StrictInt | Literal["auto"] | None = None
    batch_size: StrictInt | Literal["auto"] | None = None
    learning_rate_multiplier: Number | Literal["auto"] | None = None


class SupervisedBody(Strict):
    """The only method there is."""

    hyperparameters: HyperparametersBody | None = None


class MethodBody(Strict):
    """OpenAI's newer place for hyperparameters."""

    type: Literal["supervised"]
    supervised: SupervisedBody | None = None


class CheckpointBody(Strict):
    """When nodes save checkpoints."""

    every_steps: StrictInt | None = None
    every_s: Number | None = None


class QualityGateBody(Strict):
    """What is done with the loss on held-out examples."""

    tolerance: Number | None = None
    max_bad_evaluations: StrictInt | None = None
    publish: StrictBool = False


class LoraBody(Strict):
    """An adapter."""

    rank: StrictInt | None = None
    alpha: Number | None = None
    dropout: Number | None = None
    target_modules: list[StrictStr] | None = None


class LemixTraining(Strict):
    """Our extension of jobs; meanings and defaults as in types.proto."""

    kind: Literal["online", "isolated"] = "online"
    method: Literal["full", "lora"] | None = None
    lora: LoraBody | None = None
    learning_rate: Number | None = None
    gradient_accumulation_steps: StrictInt | None = None
    lr_schedule: StrictStr | None = None
    warmup_steps: StrictInt | None = None
    weight_decay: Number | None = None
    max_grad_norm: Number | None = None
    max_skipped_in_row: StrictInt | None = None
    checkpoint: CheckpointBody | None = None
    quality_gate: QualityGateBody | None = None


class JobBody(Body):
    """POST /v1/fine_tuning/jobs."""

    model: StrictStr
    training_file: StrictStr
    validation_file: StrictStr | None = None
    hyperparameters: HyperparametersBody | None = None
    method: MethodBody | None = None
    lemix: LemixTraining = LemixTraining()


class FeedbackBody(Body):
    """POST /v1/feedback: `text`, or `prompt` and `completion`, or `messages`."""

    model: StrictStr = ""
    text: StrictStr | None = None
    prompt: StrictStr | None = None
    completion: StrictStr | None = None
    messages: list[MessageBody] | None = None
    request_id: StrictStr = ""
