"""How each request on the last stage is sampled: its parameters, what it has produced, and its next token.

Penalties, bias and the ban on early end tokens change the logits before `sampling.pick_tokens`; they are functions of
the request's own output, so that a request gets the same tokens whatever it is batched with.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from services.node_agent.engine.inference_ops import Logprobs, SampledToken, Sampling
from services.node_agent.engine.torch.sampling import Draw, pick_tokens


@dataclass(slots=True)
class _Sampled:
    """A request on this stage. `is_plain`: its logits are never changed. `counts`: its output by token; kept only where
    a penalty needs it."""

    sampling: Sampling
    num_prompt: int
    has_penalty: bool = field(init=False)
    is_plain: bool = field(init=False)
    counts: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        sampling = self.sampling
        self.has_penalty = sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        self.is_plain = not (self.has_penalty or sampling.logit_bias or sampling.min_tokens)


class Sampler:
    """The requests of a last stage."""

    def __init__(self, eos_token_ids: Collection[int]) -> None:
        self._eos = frozenset(eos_token_ids)
        self._requests: dict[str, _Sampled] = {}

    def begin(self, request_id: str, sampling: Sampling, num_prompt: int, output_ids: Sequence[int] = ()) -> None:
        """A request whose prompt has so many tokens, with its output so far; one that is known starts anew."""
        request = self._requests[request_id] = _Sampled(sampling, num_prompt)
        if request.has_penalty:
            request.counts.update(output_ids)

    def forget(self, request_id: str) -> None:
        """A request that left; an unknown id is ignored."""
        self._requests.pop(request_id, None)

    def sample(self, logits: Tensor, places: Sequence[tuple[str, int]]) -> tuple[SampledToken, ...]:
        """The next token of each request. logits (n, vocab). places: request id, and where the token will stand,
        counted from the first token of the prompt. Raises KeyError for an unknown request."""
        requests = [self._requests[request_id] for request_id, _ in places]
        draws = [Draw(request.sampling, index) for request, (_, index) in zip(requests, places, strict=True)]
        tokens = pick_tokens(self._adjusted(logits, requests, draws), draws)
        logprobs = _logprobs(logits, tokens, [request.sampling.logprobs for request in requests])
        for request, token in zip(requests, tokens, strict=True):
            if request.has_penalty:
                request.counts[token] += 1
        return tuple(
            SampledToken(request_id, token, token in self._eos and not request.sampling.ignore_eos, found)
            for (request_id, _), request, token, found in zip(places, requests, tokens, logprobs, strict=True)
        )

    def _adjusted(self, logits: Tensor, requests: Sequence[_Sampled], draws: Sequence[Draw]) -> Tensor:
        """Logits to pick from; the same tensor when no request asks for a change."""
        if all(request.is_plain for request in requests):
            return logits
        changes = [self._changes(request, draw) for request, draw in zip(requests, draws, strict=True)]
        if not any(changes):
            return logits
        rows = [row for row, change in enumerate(changes) for _ in change]
        columns = [token for change in changes for token in change]
        values = [value for change in changes for value in change.values()]
        device = logits.device
        adjusted = logits.clone()
        # No place comes twice, so that nothing has to be accumulated.
        where = torch.tensor(rows, device=device), torch.tensor(columns, device=device)
        adjusted[where] += torch.tensor(values, dtype=logits.dtype, device=device)
        return adjusted

    def _changes(self, request: _Sampled, draw: Draw) -> dict[int, float]:
        """What to add to a request's logits by token."""
        sampling = request.sampling
        changes = dict(sampling.logit_bias)
        for token, count in request.counts.items():
            penalty = sampling.presence_penalty + count * sampling.frequency_penalty
            changes[token] = changes.get(token, 0.0) - penalty
        if draw.index - request.num_prompt < sampling.min_tokens:
            changes.update(dict.fromkeys(self._eos, float("-inf")))
        return changes


def _logprobs(logits: Tensor, tokens: Sequence[int], wanted: Sequence[int | None]) -> list[Logprobs | None]:
    """What each row reports of its token; `wanted` as `Sampling.logprobs`."""
    found: list[Logprobs | None] = [None] * len(tokens)
    rows = [row for row, count in enumerate(wanted) if count is not None]
    if not rows:
        return found
    chosen = logits if len(rows) == len(tokens) else logits[rows]
    logprobs = chosen.double().log_softmax(-1)
    own = logprobs.gather(-1, torch.tensor([[tokens[row]] for row in rows], device=logits.device)).squeeze(-1).tolist()
    most = min(max(wanted[row] or 0 for row in rows), logits.shape[-1])
    values, ids = logprobs.topk(most, dim=-1)
    for row, logprob, top_values, top_ids in zip(rows, own, values.tolist(), ids.tolist(), strict=True):
        count = wanted[row] or 0
        found[row] = Logprobs(logprob, tuple(zip(top_ids[:count], top_values[:count], strict=True)))
    return found
