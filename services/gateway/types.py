"""What both front doors, REST and gRPC, ask of the application layer and get back."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lemix.v1 import types_pb2


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation. role: "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen; None leaves the choice to the gateway. Ranges: see types.proto."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One request as its client meant it.

    n: outputs wanted. max_staleness_s: most seconds since the newest optimizer step in the serving weights.
    prompt: text, token ids, or turns. request_id: empty, the gateway makes one. reference: true continuation whose loss
    is measured, as text or tokens. slo_ttft_s, slo_tpot_s: promise in seconds, None: the cluster's. timeout_s:
    None, the gateway's own.
    """

    prompt: str | tuple[int, ...] | tuple[Turn, ...]
    model: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    request_id: str = ""
    session_id: str = ""
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    reference: str | None = None
    reference_token_ids: tuple[int, ...] = ()
    max_staleness_s: float | None = None
    timeout_s: float | None = None

    @property
    def num_chars(self) -> int:
        """Size of prompt and reference: characters, or tokens where those are given."""
        parts = (len(part.content) if isinstance(part, Turn) else 1 for part in self.prompt)
        num_prompt = len(self.prompt) if isinstance(self.prompt, str) else sum(parts)
        return num_prompt + len(self.reference or "") + len(self.reference_token_ids)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its text and its log-probability, nats."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True, slots=True)
class OutputLogprob:
    """What is reported of one output token. top: the likeliest tokens in its place, likeliest first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of a request, all its choices together; the prompt counts once."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How one choice ended. ttft_s: arrival at the gateway to the first token; None: no token came."""

    finish_reason: types_pb2.FinishReason
    prompt_tokens: int
    completion_tokens: int
    report: types_pb2.ServingReport
    ttft_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """New output of one choice, whose last piece carries its ending. The very last piece carries the usage.

    logprobs: one per token, if asked for.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    choice_index: int = 0
    logprobs: tuple[OutputLogprob, ...] = ()
    ending: Ending | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One whole output. logprobs: one per token, if asked for."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[OutputLogprob, ...]
    ending: Ending


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Every output of a request, at least one."""

    request_id: str
    choices: tuple[Choice, ...]
    usage: Usage
