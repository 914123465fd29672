"""What both front doors, REST and gRPC, ask of the application layer and get back."""

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
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One request as its client meant it.

    prompt: text, token ids, or turns. request_id: empty, the gateway makes one. reference: true continuation whose loss
    is measured, as text or tokens. slo_ttft_s, slo_tpot_s: promise in seconds, None: the cluster's. timeout_s:
    None, the gateway's own.
    """

    prompt: str | tuple[int, ...] | tuple[Turn, ...]
    model: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    request_id: str = ""
    session_id: str = ""
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    reference: str | None = None
    reference_token_ids: tuple[int, ...] = ()
    timeout_s: float | None = None

    @property
    def num_chars(self) -> int:
        """Size of prompt and reference: characters, or tokens where those are given."""
        parts = (len(part.content) if isinstance(part, Turn) else 1 for part in self.prompt)
        num_prompt = len(self.prompt) if isinstance(self.prompt, str) else sum(parts)
        return num_prompt + len(self.reference or "") + len(self.reference_token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a generation ended. ttft_s: arrival at the gateway to the first token; None: no token came."""

    finish_reason: types_pb2.FinishReason
    prompt_tokens: int
    completion_tokens: int
    report: types_pb2.ServingReport
    ttft_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """New output. The last piece of a generation carries its ending."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    ending: Ending | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A whole output."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    ending: Ending
