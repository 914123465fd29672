"""Prefill and decode of one stage: ragged batches over the KV cache, and sampling on the last stage."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor
from torch.nn import functional

from services.node_agent.engine.base import Decode, DecodeSequence, Prefill, PrefillSequence, SampledToken, Sampling
from services.node_agent.engine.torch.attention import PackedRuns
from services.node_agent.engine.torch.kv_cache import KvCache, KvEntry, KvShape, KvWrite, Slab, plan_writes
from services.node_agent.engine.torch.sampling import Draw, pick_tokens
from services.node_agent.engine.torch.stage import Stage


@dataclass(frozen=True, slots=True)
class InferenceOutput:
    """`hidden` (T, hidden) for the next stage; the rest on the last stage only."""

    hidden: Tensor | None = None
    tokens: tuple[SampledToken, ...] = ()
    reference_losses: tuple[tuple[str, float], ...] = ()


class Inference:
    """Serving state of a stage: its KV cache and, on the last stage, how each request is sampled."""

    def __init__(self, stage: Stage, *, kv_capacity_tokens: int, max_context_tokens: int) -> None:
        spec = stage.spec
        shape = KvShape(stage.num_layers, spec.num_kv_heads, spec.head_dim, stage.dtype, stage.device)
        self._stage = stage
        self._eos = frozenset(spec.eos_token_ids)
        self._max_context_tokens = max_context_tokens
        self._samplings: dict[str, Sampling] = {}
        self.cache = KvCache(shape, kv_capacity_tokens)

    @torch.inference_mode()
    def prefill(self, op: Prefill, hidden: Tensor | None) -> InferenceOutput:
        """Run prompts and cache them; a request that was cached before starts anew. Raises ValueError, KvCacheFull."""
        self._check(op.sequences)
        try:
            entries = [self.cache.reserve(s.request_id, len(s.token_ids) + s.max_tokens) for s in op.sequences]
            return self._prefill(op.sequences, entries, hidden)
        except BaseException:
            self.forget(sequence.request_id for sequence in op.sequences)
            raise

    @torch.inference_mode()
    def decode(self, op: Decode, hidden: Tensor | None) -> InferenceOutput:
        """Run the newest token of each request. Raises KeyError for an unknown one, ValueError for a wrong position."""
        entries = [self._decode_entry(sequence) for sequence in op.sequences]
        if len({sequence.request_id for sequence in op.sequences}) != len(entries):
            raise ValueError("a request appears twice in one decode")
        # Rows in cache order make a batch of all requests of a slab one slice of it.
        order = sorted(range(len(entries)), key=lambda row: (entries[row].slab.length, entries[row].slot))
        in_order = order == list(range(len(order)))
        sequences = [op.sequences[row] for row in order]
        attention = _DecodeAttention.plan([entries[row] for row in order], sequences, self._stage)
        positions = self._stage.tensor([sequence.position for sequence in sequences])
        if self._stage.is_first:
            inputs = self._stage.tensor([sequence.token_id for sequence in sequences])
        else:
            assert hidden is not None
            inputs = hidden if in_order else hidden[order]
        rows = self._stage.forward(inputs, positions, attention)
        for sequence, row in zip(sequences, order, strict=True):
            entries[row].used = sequence.position + 1
        if not in_order:
            restored = torch.empty_like(rows)
            restored[order] = rows
            rows = restored
        if self._stage.is_last:
            return InferenceOutput(tokens=self._sample(self._stage.logits(rows), op.sequences))
        return InferenceOutput(hidden=rows)

    @torch.inference_mode()
    def occupy(self, request_ids: Sequence[str], tokens: int) -> None:
        """Give requests caches of `tokens` zero positions and room for one more, to time decoding behind them."""
        for request_id in request_ids:
            self.cache.reserve(request_id, tokens + 1).used = tokens
            self._samplings[request_id] = Sampling()

    @torch.inference_mode()
    def forget(self, request_ids: Iterable[str]) -> None:
        """Free requests' caches; unknown ids are ignored."""
        known = [request_id for request_id in request_ids if request_id in self.cache]
        # The last slot of a slab first: then nothing has to move into a hole.
        for request_id in sorted(known, key=lambda known_id: self.cache.entry(known_id).slot, reverse=True):
            self.cache.free(request_id)
            self._samplings.pop(request_id, None)

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

    def _prefill(
        self, sequences: Sequence[PrefillSequence], entries: Sequence[KvEntry], hidden: Tensor | None
    ) -> InferenceOutput:
        stage = self._stage
        prompts = [len(sequence.token_ids) for sequence in sequences]
        lengths = [len(s.token_ids) + len(s.reference_ids) for s in sequences]
        starts = [0, *accumulate(lengths)][:-1]
        spans = [(start, 0, prompt) for start, prompt in zip(starts, prompts, strict=True)]
        writes = plan_writes(entries, spans, sum(lengths), stage.device)
        positions = stage.tensor(list(chain.from_iterable(range(length) for length in lengths)))
        inputs = hidden
        if stage.is_first:
            inputs = stage.tensor(list(chain.from_iterable((*s.token_ids, *s.reference_ids) for s in sequences)))
        assert inputs is not None
        rows = stage.forward(inputs, positions, _PrefillAttention(PackedRuns.of(lengths), writes))
        for entry, prompt in zip(entries, prompts, strict=True):
            entry.used = prompt
        if not stage.is_last:
            return InferenceOutput(hidden=rows)
        for sequence in sequences:
            self._samplings[sequence.request_id] = sequence.sampling
        # The projection runs only on rows whose logits are used: each prompt's last one and those before a reference.
        wanted = [range(s + p - 1, s + max(n - 1, p)) for s, p, n in zip(starts, prompts, lengths, strict=True)]
        used = list(chain.from_iterable(wanted))
        logits = stage.logits(rows if len(used) == len(rows) else rows[used])
        firsts = [0, *accumulate(len(span) for span in wanted)][:-1]
        tokens = self._sample(logits if len(firsts) == len(used) else logits[firsts], sequences)
        losses = _reference_losses(logits, firsts, sequences, stage)
        return InferenceOutput(tokens=tokens, reference_losses=losses)

    def _decode_entry(self, sequence: DecodeSequence) -> KvEntry:
        entry = self.cache.entry(sequence.request_id)
        if sequence.position > entry.used or sequence.position >= entry.reserved:
            raise ValueError(
                f"request {sequence.request_id} decodes position {sequence.position}, but its cache holds "
                f"{entry.used} of {entry.reserved} reserved"
            )
        _check_tokens(sequence.request_id, (sequence.token_id,), self._stage)
        return entry

    def _sample(
        self, logits: Tensor, sequences: Sequence[PrefillSequence | DecodeSequence]
    ) -> tuple[SampledToken, ...]:
        draws = []
        for sequence in sequences:
            index = sequence.position + 1 if isinstance(sequence, DecodeSequence) else len(sequence.token_ids)
            draws.append(Draw(self._samplings[sequence.request_id], index))
        return tuple(
            SampledToken(sequence.request_id, token, token in self._eos and not draw.sampling.ignore_eos)
            for sequence, draw, token in zip(sequences, draws, pick_tokens(logits, draws), strict=True)
        )


@dataclass(frozen=True, slots=True)
class _PrefillAttention:
    packed: PackedRuns
    writes: list[KvWrite]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        for write in self.writes:
            write(layer, key, value)
        return self.packed.attend(query, key, value, scale)


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Neighbouring rows whose caches lie in one slab; `slots` None: exactly the slots first..first + rows."""

    slab: Slab
    rows: int
    first: int
    slots: Tensor | None
    length: int
    mask: Tensor

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """query (rows, heads, head_dim) -> the same shape."""
        heads, head_dim = query.shape[1:]
        keys, values = self._select(self.slab.keys[layer]), self._select(self.slab.values[layer])
        # Query heads that share a key head are laid out as query positions, which needs no copy of keys per head.
        grouped = query.view(self.rows, keys.shape[1], -1, head_dim)
        output = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.mask, scale=scale)
        return output.reshape(self.rows, heads, head_dim)

    def _select(self, tensor: Tensor) -> Tensor:
        filled = tensor[:, : self.length]
        chosen = filled[self.first : self.first + self.rows] if self.slots is None else filled[self.slots]
        return chosen.transpose(1, 2)


@dataclass(frozen=True, slots=True)
class _DecodeAttention:
    groups: list[_DecodeGroup]
    writes: list[KvWrite]

    @classmethod
    def plan(cls, entries: list[KvEntry], sequences: list[DecodeSequence], stage: Stage) -> "_DecodeAttention":
        """entries sorted by slab and slot."""
        spans = [(row, sequence.position, 1) for row, sequence in enumerate(sequences)]
        writes = plan_writes(entries, spans, len(entries), stage.device)
        groups = []
        start = 0
        while start < len(entries):
            slab = entries[start].slab
            end = start
            while end < len(entries) and entries[end].slab is slab:
                end += 1
            groups.append(_plan_group(slab, entries[start:end], sequences[start:end], stage))
            start = end
        return cls(groups, writes)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        for write in self.writes:
            write(layer, key, value)
        if len(self.groups) == 1:
            return self.groups[0].attend(layer, query, scale)
        pieces = torch.split(query, [group.rows for group in self.groups])
        return torch.cat([group.attend(layer, piece, scale) for group, piece in zip(self.groups, pieces, strict=True)])


def _plan_group(slab: Slab, entries: list[KvEntry], sequences: list[DecodeSequence], stage: Stage) -> _DecodeGroup:
    slots = [entry.slot for entry in entries]
    contiguous = slots[-1] - slots[0] == len(slots) - 1
    positions = stage.tensor([sequence.position for sequence in sequences])
    length = max(sequence.position for sequence in sequences) + 1
    hidden = torch.arange(length, device=stage.device) > positions.unsqueeze(1)
    mask = torch.zeros(hidden.shape, dtype=stage.dtype, device=stage.device).masked_fill_(hidden, float("-inf"))
    return _DecodeGroup(
        slab=slab,
        rows=len(slots),
        first=slots[0],
        slots=None if contiguous else stage.tensor(slots),
        length=length,
        mask=mask[:, None, None, :],
    )


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
