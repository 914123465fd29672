"""Prefill and decode of one stage: ragged batches over the KV cache, and sampling on the last stage."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

import torch
from torch import Tensor
from torch.nn import functional

from services.node_agent.engine.inference_ops import (
    Decode,
    DecodeSequence,
    Prefill,
    PrefillSequence,
    SampledToken,
    Sampling,
)
from services.node_agent.engine.torch.adapters import Use
from services.node_agent.engine.torch.cached_attention import CachedAttention, DecodeAttention, PromptAttention
from services.node_agent.engine.torch.kv_cache import KvCache, KvEntry, KvShape, plan_write
from services.node_agent.engine.torch.outlet import CLOSED, Allocate, Outlet
from services.node_agent.engine.torch.sampler import Sampler
from services.node_agent.engine.torch.stage import Stage


@dataclass(frozen=True, slots=True)
class InferenceOutput:
    """`hidden` (T, hidden) for the next stage; the rest on the last stage only."""

    hidden: Tensor | None = None
    tokens: tuple[SampledToken, ...] = ()
    reference_losses: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class _Piece:
    """The part of a prompt that an op computes: tokens start..end, then the reference if this ends the prompt."""

    sequence: PrefillSequence
    entry: KvEntry
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        """Whether it ends the prompt, so that a token can be sampled."""
        return self.end == len(self.sequence.token_ids)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """What is computed."""
        tokens = self.sequence.token_ids[self.start : self.end]
        return tokens + self.sequence.reference_ids if self.is_last else tokens


class Inference:
    """Serving state of a stage: its KV cache and, on the last stage, how each request is sampled."""

    def __init__(
        self,
        stage: Stage,
        *,
        kv_capacity_tokens: int,
        max_context_tokens: int,
        kv_block_tokens: int,
        allocate: Allocate | None = None,
    ) -> None:
        """allocate: memory for rows that go to the next stage; None: memory like any other."""
        spec = stage.spec
        shape = KvShape(stage.num_layers, spec.num_kv_heads, spec.head_dim, stage.dtype, stage.device, kv_block_tokens)
        self._stage = stage
        self._outlet = CLOSED if stage.is_last else Outlet(output=allocate)
        self._max_context_tokens = max_context_tokens
        self._sampler = Sampler(spec.eos_token_ids)
        #: Requests that are served by an isolated adapter.
        self._adapter_ids: dict[str, str] = {}
        self.cache = KvCache(shape, kv_capacity_tokens // kv_block_tokens)

    @torch.inference_mode()
    def prefill(self, op: Prefill, hidden: Tensor | None) -> InferenceOutput:
        """Run prompts, or pieces of them, and single tokens of other requests. Raises ValueError, KeyError,
        KvCacheFull; the op's prompts are dropped then."""
        try:
            self._check(op.sequences)
            pieces = [self._open(sequence) for sequence in op.sequences if not sequence.shares]
            shared = [sequence for sequence in op.sequences if sequence.shares]
            return self._run(pieces, op.decodes, hidden, shared)
        except BaseException:
            self.forget(sequence.request_id for sequence in op.sequences)
            raise

    @torch.inference_mode()
    def decode(self, op: Decode, hidden: Tensor | None) -> InferenceOutput:
        """Run the newest token of each request. Raises KeyError for an unknown one, ValueError for a wrong position,
        KvCacheFull."""
        return self._run((), op.sequences, hidden)

    @torch.inference_mode()
    def occupy(self, request_ids: Sequence[str], tokens: int) -> None:
        """Give requests caches of `tokens` zero positions, to time decoding behind them."""
        for request_id in request_ids:
            entry = self.cache.open(request_id)
            self.cache.grow(entry, tokens)
            entry.token_ids = [0] * tokens
            self._sampler.begin(request_id, Sampling(), tokens)

    def forget(self, request_ids: Iterable[str]) -> None:
        """Free requests' caches; unknown ids are ignored."""
        for request_id in request_ids:
            self.cache.free(request_id)
            self._sampler.forget(request_id)
            self._adapter_ids.pop(request_id, None)

    def _check(self, sequences: Sequence[PrefillSequence]) -> None:
        if len({sequence.request_id for sequence in sequences}) != len(sequences):
            raise ValueError("a request appears twice in one prefill")
        for sequence in sequences:
            if not sequence.token_ids or sequence.max_tokens < 1:
                raise ValueError(f"request {sequence.request_id} needs a prompt and max_tokens of at least 1")
            extra = max(sequence.max_tokens, len(sequence.reference_ids))
            if len(sequence.token_ids) + extra > self._max_context_tokens:
                raise ValueError(
                    f"request {sequence.request_id} needs {len(sequence.token_ids)} + {extra} tokens; "
                    f"the context holds {self._max_context_tokens}"
                )
            _check_tokens(sequence.request_id, (*sequence.token_ids, *sequence.reference_ids), self._stage)

    def _open(self, sequence: PrefillSequence) -> _Piece:
        """The piece of a prompt to compute, with its blocks."""
        if sequence.adapter_id:
            self._stage.adapters.get(sequence.adapter_id)
            self._adapter_ids[sequence.request_id] = sequence.adapter_id
        start = sequence.cached_tokens
        end = sequence.end_token or len(sequence.token_ids)
        if not 0 <= start < end <= len(sequence.token_ids):
            raise ValueError(
                f"request {sequence.request_id} cannot run tokens {start} to {end} of {len(sequence.token_ids)}"
            )
        if sequence.continues:
            entry = self.cache.take_over(sequence.request_id, sequence.continues)
            self._sampler.forget(sequence.continues)
            self._adapter_ids.pop(sequence.continues, None)
            # Its client may have sent another history: what differs is computed.
            start = _common_length(entry.token_ids, sequence.token_ids[:start])
        elif start:
            entry = self.cache.present(sequence.request_id)
            if entry.used != start:
                raise ValueError(f"request {sequence.request_id} goes on at {start}, its cache holds {entry.used}")
        else:
            entry = self.cache.open(sequence.request_id)
        self.cache.trim(entry, start)
        self.cache.grow(entry, end)
        return _Piece(sequence, entry, start, end)

    def _run(
        self,
        pieces: Sequence[_Piece],
        decodes: Sequence[DecodeSequence],
        hidden: Tensor | None,
        shared: Sequence[PrefillSequence] = (),
    ) -> InferenceOutput:
        """Pieces of prompts and single new tokens in one forward. shared: they have the prompts of pieces that end."""
        stage = self._stage
        decode_entries = self._decode_entries(decodes)
        computed = [piece.token_ids for piece in pieces]
        lengths = [len(tokens) for tokens in computed]
        starts = [0, *accumulate(lengths)]
        token_ids = [*chain.from_iterable(computed), *(sequence.token_id for sequence in decodes)]
        positions = [
            *chain.from_iterable(range(p.start, p.start + n) for p, n in zip(pieces, lengths, strict=True)),
            *(sequence.position for sequence in decodes),
        ]
        spans = [(row, piece.start, piece.end - piece.start) for row, piece in zip(starts, pieces, strict=False)]
        spans += [(starts[-1] + row, sequence.position, 1) for row, sequence in enumerate(decodes)]
        prompts = [piece.entry for piece in pieces]
        attention = CachedAttention(
            plan_write(self.cache, prompts + decode_entries, spans, len(positions)),
            PromptAttention(self.cache, prompts, lengths, [piece.start for piece in pieces]) if pieces else None,
            DecodeAttention.plan(self.cache, decode_entries, [s.position for s in decodes]) if decodes else None,
        )
        inputs = stage.tensor(token_ids) if stage.is_first else hidden
        assert inputs is not None
        with stage.adapters.applied(self._adapter_uses(pieces, lengths, decodes)):
            rows = stage.forward(inputs, stage.tensor(positions), attention, self._outlet)
        for piece in pieces:
            piece.entry.token_ids[piece.start :] = piece.sequence.token_ids[piece.start : piece.end]
        for entry, sequence in zip(decode_entries, decodes, strict=True):
            entry.token_ids[sequence.position :] = [sequence.token_id]
        for choice in shared:
            self._share(choice)
        if not stage.is_last:
            return InferenceOutput(hidden=rows)
        return self._results(rows, pieces, starts, decodes, shared)

    def _share(self, sequence: PrefillSequence) -> None:
        """Copy what was computed for another request."""
        self.cache.copy(sequence.request_id, sequence.shares)
        if self.cache.entry(sequence.request_id).token_ids != list(sequence.token_ids):
            raise ValueError(f"request {sequence.request_id} has another prompt than {sequence.shares}")
        if sequence.adapter_id:
            self._adapter_ids[sequence.request_id] = sequence.adapter_id

    def _adapter_uses(
        self, pieces: Sequence[_Piece], lengths: Sequence[int], decodes: Sequence[DecodeSequence]
    ) -> list[Use]:
        """Adapters of a batch whose pieces have so many rows, decoding requests one each."""
        adapters = self._stage.adapters
        if not self._adapter_ids:
            return adapters.online()
        request_ids = [*(piece.sequence.request_id for piece in pieces), *(decode.request_id for decode in decodes)]
        ids = [self._adapter_ids.get(request_id, "") for request_id in request_ids]
        if not any(ids):
            return adapters.online()
        rows: dict[str, list[int]] = {}
        start = 0
        for adapter_id, length in zip(ids, (*lengths, *(1 for _ in decodes)), strict=True):
            rows.setdefault(adapter_id, []).extend(range(start, start + length))
            start += length
        if len(rows) == 1:
            return [Use(adapters.get(ids[0]))]
        chosen = {adapter_id: self._stage.tensor(indices) for adapter_id, indices in rows.items()}
        uses = [Use(adapters.get(adapter_id), indices) for adapter_id, indices in chosen.items() if adapter_id]
        if "" in chosen:
            uses += [replace(use, rows=chosen[""]) for use in adapters.online()]
        return uses

    def _results(
        self,
        rows: Tensor,
        pieces: Sequence[_Piece],
        starts: Sequence[int],
        decodes: Sequence[DecodeSequence],
        shared: Sequence[PrefillSequence],
    ) -> InferenceOutput:
        """Tokens and losses from the last stage's rows. starts: each piece's first row, and behind them the first of
        the decoding requests."""
        ends = [(piece, start) for piece, start in zip(pieces, starts, strict=False) if piece.is_last]
        for sequence in (*(piece.sequence for piece, _ in ends), *shared):
            num_prompt = len(sequence.token_ids) - sequence.output_tokens
            self._sampler.begin(sequence.request_id, sequence.sampling, num_prompt, sequence.token_ids[num_prompt:])
        # The projection runs only on rows whose logits are used: each prompt's last one and those before a reference.
        wanted = []
        for piece, start in ends:
            last = start + piece.end - piece.start - 1
            wanted.append(range(last, last + max(1, len(piece.sequence.reference_ids))))
        used = [*chain.from_iterable(wanted), *range(starts[-1], len(rows))]
        if not used:
            return InferenceOutput()
        logits = self._stage.logits(rows if len(used) == len(rows) else rows[used])
        firsts = [0, *accumulate(len(span) for span in wanted)]
        finished = [piece.sequence for piece, _ in ends]
        row_of = {sequence.request_id: row for sequence, row in zip(finished, firsts, strict=False)}
        own = [*firsts[:-1], *(row_of[sequence.shares] for sequence in shared)]
        sampled = [*own, *range(firsts[-1], len(used))]
        is_whole = sampled == list(range(len(used)))
        tokens = self._sample(logits if is_whole else logits[sampled], [*finished, *shared, *decodes])
        return InferenceOutput(
            tokens=tokens, reference_losses=_reference_losses(logits, firsts[:-1], finished, self._stage)
        )

    def _decode_entries(self, sequences: Sequence[DecodeSequence]) -> list[KvEntry]:
        """The caches of decoding requests, with a block for the new token."""
        entries = []
        for sequence in sequences:
            entry = self.cache.present(sequence.request_id)
            if sequence.position > entry.used:
                raise ValueError(
                    f"request {sequence.request_id} decodes position {sequence.position}, but its cache holds "
                    f"{entry.used}"
                )
            _check_tokens(sequence.request_id, (sequence.token_id,), self._stage)
            entries.append(entry)
        if len({sequence.request_id for sequence in sequences}) != len(entries):
            raise ValueError("a request appears twice in one decode")
        for entry, sequence in zip(entries, sequences, strict=True):
            self.cache.grow(entry, sequence.position + 1)
        return entries

    def _sample(
        self, logits: Tensor, sequences: Sequence[PrefillSequence | DecodeSequence]
    ) -> tuple[SampledToken, ...]:
        places = [
            (s.request_id, s.position + 1 if isinstance(s, DecodeSequence) else len(s.token_ids)) for s in sequences
        ]
        return self._sampler.sample(logits, places)


def _reference_losses(
    logits: Tensor, firsts: Sequence[int], sequences: Sequence[PrefillSequence], stage: Stage
) -> tuple[tuple[str, float], ...]:
    """Mean loss in nats of each reference continuation, given its prompt and the reference tokens before."""
    losses = []
    for first, sequence in zip(firsts, sequences, strict=True):
        if sequence.reference_ids:
            rows = logits[first : first + len(sequence.reference_ids)]
            loss = functional.cross_entropy(rows, stage.tensor(sequence.reference_ids))
            losses.append((sequence.request_id, float(loss)))
    return tuple(losses)


def _check_tokens(request_id: str, token_ids: Sequence[int], stage: Stage) -> None:
    if min(token_ids) < 0 or max(token_ids) >= stage.spec.vocab_size:
        raise ValueError(f"{request_id} has a token id outside the vocabulary of {stage.spec.vocab_size}")


def _common_length(held: Sequence[int], wanted: Sequence[int]) -> int:
    """Leading tokens that are the same."""
    return next(
        (place for place, (a, b) in enumerate(zip(held, wanted, strict=False)) if a != b), min(len(held), len(wanted))
    )
