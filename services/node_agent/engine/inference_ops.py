"""Ops that serve requests, and what they yield."""

from dataclasses import dataclass
from typing import NamedTuple

from services.node_agent.engine.handle import Handle


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the last stage picks tokens. temperature 0: greedy; top_k 0: no limit.

    min_tokens: no end-of-sequence token among the first so many. logit_bias: (token id, what is added to its logit).
    logprobs: likeliest tokens to report with every token; None: nothing is reported.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class PrefillSequence:
    """A prompt to run. `reference_ids`: continuation whose loss is measured; it leaves no trace in the KV cache.

    The KV cache of the request `continues` ("": none), which has ended, becomes its own; as far as it holds the first
    `cached_tokens` of the prompt, they are not run. Without `continues` they were run by earlier ops (chunks).
    end_token: run the prompt up to here; 0: to its end, which yields the first new token.
    output_tokens: so many of the last tokens are the request's own output, computed before it gave up its cache.
    shares: a sequence before it in the same op, with the same prompt, which ends there: nothing is run for this one, it
    gets a copy of that one's keys and values and a first token of its own. Empty: none.
    adapter_id: isolated adapter that serves the request from its first to its last token; empty: the model itself.
    """

    request_id: str
    token_ids: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    reference_ids: tuple[int, ...] = ()
    cached_tokens: int = 0
    continues: str = ""
    end_token: int = 0
    output_tokens: int = 0
    adapter_id: str = ""
    shares: str = ""


class DecodeSequence(NamedTuple):
    """One running request; its newest token is at `position` (0-based). A tuple because it pickles twice as fast."""

    request_id: str
    token_id: int
    position: int


@dataclass(frozen=True, slots=True)
class Prefill:
    """Run prompts, or pieces of them, and one token for each of `decodes`. `hidden` is None on stage 0."""

    op_id: int
    version: int
    sequences: tuple[PrefillSequence, ...]
    hidden: Handle | None = None
    decodes: tuple[DecodeSequence, ...] = ()


@dataclass(frozen=True, slots=True)
class Decode:
    """One token for each request."""

    op_id: int
    version: int
    sequences: tuple[DecodeSequence, ...]
    hidden: Handle | None = None


class Logprobs(NamedTuple):
    """Log-probabilities in the place of a token, nats, by the model's own distribution: before temperature, penalties
    and bias. `top`: the likeliest tokens with theirs, likeliest first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class SampledToken(NamedTuple):
    """A new token of a request. `is_end`: it is an end-of-sequence token and the request did not ignore it."""

    request_id: str
    token_id: int
    is_end: bool = False
    #: None: not asked for.
    logprobs: Logprobs | None = None
