"""Times one stage in isolation with made-up data. Weights, optimizer state and running requests stay as they are."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from services.latency import OpKind
from services.node_agent.engine.base import MeasuredMemory
from services.node_agent.engine.inference_ops import Decode, DecodeSequence, Prefill, PrefillSequence, Sampling
from services.node_agent.engine.ops import Measure
from services.node_agent.engine.torch.inference import Inference
from services.node_agent.engine.torch.kv_cache import KvShape
from services.node_agent.engine.torch.microbatch import Microbatch, TrainingOptions
from services.node_agent.engine.torch.peak_memory import PeakMemory, resident_bytes
from services.node_agent.engine.torch.stage import Stage
from services.node_agent.engine.torch.training import check_examples, make_optimizer
from services.node_agent.engine.training_ops import Example, OptimizerSpec

_LOG = logging.getLogger(__name__)

Durations = dict[str, list[float]]

_WARM_UP_TOKENS = 16


class StageTimer:
    """Runs `Measure` ops on a stage. `folder` takes the file a weight synchronisation writes."""

    def __init__(
        self, stage: Stage, folder: Path, max_context_tokens: int, kv_block_tokens: int, options: TrainingOptions
    ) -> None:
        self._stage = stage
        self._kv_block_tokens = kv_block_tokens
        self._folder = folder
        self._max_context_tokens = max_context_tokens
        self._options = options
        self._memory = PeakMemory(stage.device)

    def measure(self, op: Measure) -> tuple[tuple[tuple[str, tuple[float, ...]], ...], MeasuredMemory]:
        """Durations in seconds of the timed repetitions by op kind, and the memory that they took.

        Raises ValueError for a bad point.
        """
        if op.batch < 1 or op.length < 1 or op.repetitions < 1 or op.warmup < 0:
            raise ValueError(f"cannot measure batch {op.batch}, length {op.length}, {op.repetitions} repetitions")
        self._memory.reset()
        durations = self._durations(op)
        weights = self._stage.weights.owned
        memory = MeasuredMemory(
            resident_bytes(),
            self._memory.peak_bytes(),
            weight_bytes=sum(w.parameter.numel() * w.parameter.dtype.itemsize for w in weights),
            kv_bytes_per_token=self._block_bytes // self._kv_block_tokens,
            moved_bytes=self._num_blocks(op) * self._block_bytes if op.kind == OpKind.OFFLOAD else 0,
        )
        return tuple((kind, tuple(seconds)) for kind, seconds in durations.items()), memory

    def _durations(self, op: Measure) -> Durations:
        kinds: dict[str, Callable[[Measure], Callable[[], Durations]]] = {
            OpKind.PREFILL.value: self._prefill,
            OpKind.DECODE.value: self._decode,
            OpKind.TRAIN_FORWARD.value: self._train,
            OpKind.OPTIMIZER_STEP.value: self._optimizer_step,
            OpKind.WEIGHT_SYNC.value: self._weight_sync,
            OpKind.OFFLOAD.value: self._move,
        }
        if op.kind not in kinds:
            raise ValueError(f"cannot measure {op.kind!r}; known: {', '.join(kinds)}")
        once = kinds[op.kind](op)
        for _ in range(op.warmup):
            once()
        total: Durations = {}
        for _ in range(op.repetitions):
            for kind, durations in once().items():
                total.setdefault(kind, []).extend(durations)
        return total

    def warm_up(self) -> None:
        """Run every kind of op once. The first ones load kernels and modules, which takes a second or more: that must
        not happen while requests wait. What does not fit into memory is left out: it may never be asked for."""
        for kind in (OpKind.PREFILL, OpKind.DECODE, OpKind.TRAIN_FORWARD):
            length = min(_WARM_UP_TOKENS, self._max_context_tokens)
            op = Measure(0, kind.value, batch=1, length=length, repetitions=1, warmup=0)
            try:
                self.measure(op)
            except (MemoryError, torch.OutOfMemoryError) as error:
                _LOG.warning("no memory to warm %s up: %s", kind.value, error)
                if self._stage.device.type == "cuda":
                    torch.cuda.empty_cache()
        # One element is enough, where copies of all parameters might not fit into memory.
        parameter = nn.Parameter(torch.zeros(1, device=self._stage.device, dtype=self._stage.dtype))
        parameter.grad = torch.ones_like(parameter)
        make_optimizer([parameter], OptimizerSpec()).step()

    def activation_bytes_per_token(self) -> int:
        """Most bytes that a token of a micro-batch keeps on this stage until its backward, when every token is scored.

        Measured on examples that differ in length: equal ones are computed together, and keep less.
        """
        half = min(_WARM_UP_TOKENS, self._max_context_tokens)
        lengths = (half, half - 1)
        tokens = sum(lengths)

        def held_bytes(num_context_tokens: int) -> int:
            examples = [Example(self._tokens(length), num_context_tokens) for length in lengths]
            microbatch = Microbatch(self._stage, examples, 1.0, self._hidden(tokens), options=self._options)
            microbatch.forward()
            return microbatch.held_bytes

        all_scored = held_bytes(1)
        per_label = -(-(all_scored - held_bytes(2)) // len(lengths))
        return -(-(all_scored + len(lengths) * per_label) // tokens)

    def _prefill(self, op: Measure) -> Callable[[], Durations]:
        cached = op.cached_tokens
        length = max(1, min(op.length, self._max_context_tokens - 1 - cached))
        inference = self._inference([cached + length] * op.batch + [op.decode_length] * op.decodes)
        rows = [str(row) for row in range(op.batch)]
        prompt = (0,) * cached + self._tokens(length)
        sequences = tuple(PrefillSequence(row, prompt, Sampling(), 1, cached_tokens=cached) for row in rows)
        decodes = [f"decode {row}" for row in range(op.decodes)]
        inference.occupy(decodes, op.decode_length)
        if cached:
            inference.occupy(rows, cached)
        hidden = self._hidden(op.batch * length + op.decodes)
        decoding = tuple(DecodeSequence(name, 0, op.decode_length) for name in decodes)
        work = Prefill(0, 0, sequences, decodes=decoding)

        def once() -> Durations:
            if cached:
                for row in rows:
                    inference.cache.trim(inference.cache.entry(row), cached)
            return {OpKind.PREFILL.value: [_timed(lambda: inference.prefill(work, hidden))]}

        return once

    def _decode(self, op: Measure) -> Callable[[], Durations]:
        length = max(1, min(op.length, self._max_context_tokens - 1))
        inference = self._inference([length] * op.batch)
        inference.occupy([str(row) for row in range(op.batch)], length)
        hidden = self._hidden(op.batch)
        work = Decode(0, 0, tuple(DecodeSequence(str(row), 0, length) for row in range(op.batch)))
        return lambda: {OpKind.DECODE.value: [_timed(lambda: inference.decode(work, hidden))]}

    def _move(self, op: Measure) -> Callable[[], Durations]:
        tokens = self._num_blocks(op) * self._kv_block_tokens
        inference = self._inference([tokens])
        inference.occupy(["0"], tokens)

        def once() -> Durations:
            with torch.inference_mode():
                offload_s = _timed(lambda: inference.cache.offload("0"))
                return {
                    OpKind.OFFLOAD.value: [offload_s],
                    OpKind.RELOAD.value: [_timed(lambda: inference.cache.reload("0"))],
                }

        return once

    @property
    def _block_bytes(self) -> int:
        """Of the keys and values of one block of the KV cache."""
        spec, stage = self._stage.spec, self._stage
        shape = KvShape(
            stage.num_layers, spec.num_kv_heads, spec.head_dim, stage.dtype, stage.device, self._kv_block_tokens
        )
        return shape.block_bytes

    def _num_blocks(self, op: Measure) -> int:
        return max(1, round(op.num_bytes / self._block_bytes))

    def _inference(self, contexts: Sequence[int]) -> Inference:
        """A KV cache of its own for the measurement, with room for these contexts and one more token each."""
        block = self._kv_block_tokens
        return Inference(
            self._stage,
            kv_capacity_tokens=sum(tokens // block + 1 for tokens in contexts) * block,
            max_context_tokens=self._max_context_tokens,
            kv_block_tokens=block,
        )

    def _train(self, op: Measure) -> Callable[[], Durations]:
        examples = (Example(self._tokens(max(2, op.length))),) * op.batch
        check_examples(examples, self._stage, self._max_context_tokens)
        hidden = self._hidden(op.batch * max(2, op.length))

        def once() -> Durations:
            begin = time.monotonic()
            microbatch = Microbatch(self._stage, examples, 1.0, hidden, options=self._options)
            output = microbatch.forward()
            _wait_for_device()
            middle = time.monotonic()
            gradient = None if output.hidden is None else torch.randn_like(output.hidden)
            backward = _timed(lambda: microbatch.backward(0, gradient))
            return {OpKind.TRAIN_FORWARD.value: [middle - begin], OpKind.TRAIN_BACKWARD.value: [backward]}

        return once

    def _optimizer_step(self, op: Measure) -> Callable[[], Durations]:
        del op
        copies = [nn.Parameter(weight.parameter.detach().clone()) for weight in self._stage.weights.owned]
        optimizer = make_optimizer(copies, OptimizerSpec())

        def once() -> Durations:
            for parameter in copies:
                parameter.grad = torch.randn_like(parameter)
            return {OpKind.OPTIMIZER_STEP.value: [_timed(optimizer.step)]}

        return once

    def _weight_sync(self, op: Measure) -> Callable[[], Durations]:
        del op
        path = self._folder / "measure.safetensors"

        def write() -> None:
            named = self._stage.weights.named(with_borrowed=False)
            save_file({name: part.contiguous() for name, part in named.items()}, path)

        def read() -> None:
            for tensor in load_file(path).values():
                torch.empty_like(tensor).copy_(tensor)

        def once() -> Durations:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                # One synchronisation op either writes or reads; the slower one is what it may block for.
                return {OpKind.WEIGHT_SYNC.value: [max(_timed(write), _timed(read))]}
            finally:
                path.unlink(missing_ok=True)

        return once

    def _tokens(self, length: int) -> tuple[int, ...]:
        return tuple(torch.randint(self._stage.spec.vocab_size, (length,)).tolist())

    def _hidden(self, rows: int) -> Tensor | None:
        if self._stage.is_first:
            return None
        return torch.randn(rows, self._stage.spec.hidden_size, device=self._stage.device).to(self._stage.dtype)


def _timed(work: Callable[[], object]) -> float:
    begin = time.monotonic()
    work()
    _wait_for_device()
    return time.monotonic() - begin


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
