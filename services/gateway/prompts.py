"""From what a client asked to the work the cluster runs: tokens, defaults, limits."""

import secrets
from collections.abc import Sequence

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.gateway.tokenizer import ModelTokenizer
from services.gateway.types import GenerationRequest, Sampling, Turn
from services.gateway.validation import check_id, check_sampling, check_slo, check_staleness, invalid, is_id

#: No vocabulary has longer tokens in practice; text beyond context x this is refused before it is tokenised.
MAX_CHARS_PER_TOKEN = 128
_DEFAULT_MAX_TOKENS = 16
#: Log-probabilities of one output, 12 bytes each on the wire: below the largest message.
_MAX_OUTPUT_LOGPROBS = 500_000


class PromptBuilder:
    """Checks requests against one model and tokenises them."""

    def __init__(self, tokenizer: ModelTokenizer, model: str, default_chat_max_tokens: int) -> None:
        """default_chat_max_tokens: output limit of a conversation that names none, if the context leaves as much."""
        self._tokenizer = tokenizer
        self._default_chat_max_tokens = default_chat_max_tokens
        self.model = model

    def check_model(self, model: str) -> None:
        """Raises MODEL_NOT_FOUND unless the model is the one served, or empty."""
        if model not in ("", self.model):
            raise LemixError(
                ErrorCode.MODEL_NOT_FOUND, f"model {model[:200]!r} is not served here; {self.model!r} is", param="model"
            )

    def adapter_of(self, model: str) -> str:
        """Isolated adapter, by the id of its job, that a model name asks for; empty: the model itself.

        Raises MODEL_NOT_FOUND for the name of no adapter of this model. Whether a node holds it the scheduler knows.
        """
        base, _, job_id = model.rpartition(":")
        if model == self.model or base != self.model or not is_id(job_id):
            self.check_model(model)
            return ""
        return job_id

    def work(self, request: GenerationRequest) -> work_pb2.InferenceWork:
        """Tokenised work with every default resolved; identity and times are the caller's to fill in.

        Raises INVALID_REQUEST, MODEL_NOT_FOUND, CONTEXT_LENGTH_EXCEEDED, UNSUPPORTED.
        """
        adapter_id = self.adapter_of(request.model)
        check_sampling(request.sampling)
        check_slo(request.slo_ttft_s, request.slo_tpot_s)
        check_staleness(request.max_staleness_s)
        if adapter_id and request.max_staleness_s is not None:
            raise invalid("max_staleness_s is about the served model, not an adapter", "max_staleness_s")
        self._check_token_ids(list(request.sampling.logit_bias), "logit_bias")
        check_id(request.session_id, "session_id")
        prompt = self._prompt_tokens(request.prompt)
        reference = self._reference_tokens(request)
        max_tokens = self._output_budget(request, len(prompt), len(reference))
        _check_output(request.sampling, max_tokens)
        slo = types_pb2.Slo(ttft_s=request.slo_ttft_s, tpot_s=request.slo_tpot_s)
        return work_pb2.InferenceWork(
            prompt_token_ids=prompt,
            sampling=_resolved(request.sampling, max_tokens),
            slo=slo,
            session_id=request.session_id,
            reference_token_ids=reference,
            max_staleness_s=request.max_staleness_s,
            adapter_id=adapter_id,
        )

    def _prompt_tokens(self, prompt: str | tuple[int, ...] | tuple[Turn, ...]) -> list[int]:
        if isinstance(prompt, str):
            if not prompt:
                raise invalid("the prompt is empty", "prompt")
            self._check_characters(len(prompt), "prompt")
            tokens = self._tokenizer.encode(prompt)
        elif prompt and isinstance(prompt[0], Turn):
            tokens = self._chat_tokens([turn for turn in prompt if isinstance(turn, Turn)])
        else:
            tokens = [token for token in prompt if isinstance(token, int)]
            self._check_token_ids(tokens, "prompt")
        if not tokens:
            raise invalid("the prompt is empty", "prompt")
        return tokens

    def _chat_tokens(self, turns: Sequence[Turn]) -> list[int]:
        self._check_characters(sum(len(turn.content) for turn in turns), "messages")
        check_turns(turns)
        return self._tokenizer.encode_chat([{"role": turn.role, "content": turn.content} for turn in turns])

    def _reference_tokens(self, request: GenerationRequest) -> list[int]:
        tokens = list(request.reference_token_ids)
        if request.reference is not None:
            if tokens:
                raise invalid("give reference or reference_token_ids, not both", "reference")
            if not request.reference:
                raise invalid("the reference is empty", "reference")
            self._check_characters(len(request.reference), "reference")
            tokens = self._tokenizer.encode(request.reference, add_special_tokens=False)
        self._check_token_ids(tokens, "reference_token_ids")
        return tokens

    def _output_budget(self, request: GenerationRequest, num_prompt: int, num_reference: int) -> int:
        context = self._tokenizer.max_context_tokens
        wanted = request.sampling.max_tokens
        needed = num_prompt + (1 if wanted is None else wanted)
        if needed > context:
            output = "at least one token" if wanted is None else f"{wanted} tokens"
            raise _too_long(
                f"the model's context is {context} tokens; the prompt has {num_prompt} and {output} of output "
                f"were asked for, {needed} in all",
                "prompt" if num_prompt >= context else "max_tokens",
            )
        if num_prompt + num_reference > context:
            raise _too_long(
                f"the model's context is {context} tokens; prompt and reference have {num_prompt} + {num_reference}",
                "reference",
            )
        if wanted is not None:
            return wanted
        is_chat = not isinstance(request.prompt, str) and isinstance(request.prompt[0], Turn)
        default = self._default_chat_max_tokens if is_chat else _DEFAULT_MAX_TOKENS
        return min(default, context - num_prompt)

    def _check_characters(self, num_chars: int, param: str) -> None:
        context = self._tokenizer.max_context_tokens
        if num_chars > context * MAX_CHARS_PER_TOKEN:
            raise _too_long(f"the model's context is {context} tokens; the text has {num_chars} characters", param)

    def _check_token_ids(self, tokens: Sequence[int], param: str) -> None:
        size = self._tokenizer.vocab_size
        for token in tokens:
            if not 0 <= token < size:
                raise invalid(f"token id {token} is not in [0, {size})", param)


def check_turns(turns: Sequence[Turn]) -> None:
    """Raises INVALID_REQUEST naming the turn that cannot be used."""
    for index, turn in enumerate(turns):
        if turn.role not in ("system", "user", "assistant"):
            raise invalid(f"role {turn.role[:50]!r} is not system, user or assistant", f"messages.{index}.role")
        if not turn.content and turn.role != "assistant":
            raise invalid(f"the content of a {turn.role} message is empty", f"messages.{index}.content")


def _check_output(sampling: Sampling, max_tokens: int) -> None:
    """Raises INVALID_REQUEST for an output that contradicts itself or would be too large to be told."""
    if sampling.min_tokens > max_tokens:
        raise invalid(f"min_tokens ({sampling.min_tokens}) is more than max_tokens ({max_tokens})", "min_tokens")
    if sampling.logprobs is not None and max_tokens * (1 + sampling.logprobs) > _MAX_OUTPUT_LOGPROBS:
        message = f"max_tokens ({max_tokens}) times {1 + sampling.logprobs} log-probabilities each"
        raise invalid(f"{message} is more than {_MAX_OUTPUT_LOGPROBS}", "logprobs")


def _resolved(sampling: Sampling, max_tokens: int) -> work_pb2.ResolvedSampling:
    return work_pb2.ResolvedSampling(
        max_tokens=max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or 0,
        seed=sampling.seed if sampling.seed is not None else secrets.randbits(63),
        ignore_eos=sampling.ignore_eos,
        min_tokens=sampling.min_tokens,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=sampling.logit_bias,
        logprobs=sampling.logprobs,
        stop=sampling.stop,
    )


def _too_long(message: str, param: str) -> LemixError:
    return LemixError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, message, param=param)
