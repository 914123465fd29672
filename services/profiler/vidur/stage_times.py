"""How long the operations of a pipeline stage take, put together from the times of one layer.

Training is not in the tables: a backward takes twice its forward, an optimizer step and a copy of the weights what
their bytes take. On another GPU every part takes longer by what its roofline says.
"""

from dataclasses import dataclass

from services.model_shape import HALF_BYTES, ModelShape
from services.profiler.vidur.devices import Device
from services.profiler.vidur.tables import ELEMENTWISE, EMBEDDING, HEAD_LIKE, MATMULS, Attention, Curve, Spread

#: Bytes that AdamW reads and writes per parameter: weights and both moments in float32 (in and out), the gradient and
#: the weights that compute in bfloat16.
OPTIMIZER_BYTES = 3 * 2 * 4 + 2 * HALF_BYTES
#: Bytes that a parameter keeps: those weights and moments, gradient and computing weights.
TRAINED_BYTES = 3 * 4 + 2 * HALF_BYTES
#: Share of the memory's rate that a kernel over large arrays reaches.
_STREAM_SHARE = 0.85
#: A copy between device and host is not begun in less, seconds.
HOST_COPY_FIXED_S = 20e-6
#: Backward: gradients of inputs and of weights, as much work as the forward each.
_BACKWARD = 2.0
_ELEMENTWISE_READS = 2


@dataclass(frozen=True, slots=True)
class Tables:
    """The tables of one GPU for one model: `layer` by operation, over tokens."""

    layer: dict[str, Curve]
    attention: Attention
    transfer: Curve


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Operations of one stage. Batches are sequences, lengths tokens of each; all GPUs are `target`."""

    shape: ModelShape
    tables: Tables
    stage: int
    num_stages: int
    #: What the tables were measured on, and what is asked for.
    source: Device
    target: Device

    @property
    def num_layers(self) -> int:
        """Layers of this stage."""
        return self.shape.layers_of(self.stage, self.num_stages)

    @property
    def parameters(self) -> int:
        """Parameters of this stage."""
        return self.shape.stage_parameters(self.stage, self.num_stages)

    def prefill(self, batch: int, length: int, cached: int = 0, decodes: int = 0, decode_length: int = 0) -> Spread:
        """Prompts behind cached tokens, and one token for each of `decodes` requests with `decode_length` before it."""
        attention_s = self._prefill_attention_s(batch, length, cached)
        if decodes:
            attention_s += self._decode_attention_s(decodes, decode_length)
        return self._forward(batch * length + decodes, batch + decodes, attention_s)

    def decode(self, batch: int, context: int) -> Spread:
        """One token for each request."""
        return self._forward(batch, batch, self._decode_attention_s(batch, context))

    def train_forward(self, batch: int, length: int) -> Spread:
        """Of a micro-batch: like prompts, but all tokens have logits."""
        return self._forward(batch * length, batch * length, self._prefill_attention_s(batch, length, 0))

    def train_backward(self, batch: int, length: int) -> Spread:
        """Without the activations' way to the next stage, which the gradient goes the other way instead."""
        tokens = batch * length
        attention_s = self._prefill_attention_s(batch, length, 0)
        compute = self._compute(tokens, tokens, attention_s).times(_BACKWARD)
        return compute + self._transfer(tokens) if self.stage else compute

    def optimizer_step_s(self) -> float:
        """Seconds of AdamW over the stage's parameters."""
        return self.parameters * OPTIMIZER_BYTES / (self.target.memory_bytes_per_s * _STREAM_SHARE)

    def weight_sync_s(self) -> float:
        """Seconds to copy the stage's computing weights to host memory, or back."""
        return self.host_copy_s(self.parameters * HALF_BYTES)

    def host_copy_s(self, num_bytes: int) -> float:
        """Seconds of a copy between device and host memory."""
        return HOST_COPY_FIXED_S + num_bytes / self.target.host_copy_bytes_per_s

    def roofline_s(self, tokens: int, logits: int, pairs: float, kv_tokens: float) -> float:
        """Least seconds of a forward: `pairs` of tokens in attention, which reads `kv_tokens` keys and values."""
        matmul = self.num_layers * self._roofline_s("matmul", self.target, tokens)
        attention = self.num_layers * self._attention_roofline_s(self.target, pairs, kv_tokens)
        is_last = self.stage == self.num_stages - 1
        return matmul + attention + (self._roofline_s("head", self.target, logits) if is_last else 0.0)

    # ------------------------------------------------------------- parts of a forward

    def _forward(self, tokens: int, logits: int, attention_s: float) -> Spread:
        compute = self._compute(tokens, logits, attention_s)
        return compute if self.stage == self.num_stages - 1 else compute + self._transfer(tokens)

    def _compute(self, tokens: int, logits: int, attention_s: float) -> Spread:
        layer = self._part("matmul", MATMULS, tokens) + self._part("elementwise", ELEMENTWISE, tokens)
        total = (layer + Spread.exactly(attention_s)).times(self.num_layers)
        if self.stage == 0:
            total += self._part("elementwise", (EMBEDDING,), tokens)
        if self.stage == self.num_stages - 1:
            columns = self.shape.vocab_size / (2 * self.shape.intermediate)
            total += self._part("head", (HEAD_LIKE,), logits).times(columns)
        return total

    def _part(self, kind: str, operations: tuple[str, ...], tokens: float) -> Spread:
        total = Spread.exactly(0.0)
        for name in operations:
            total += self.tables.layer[name].at(tokens)
        ratio = self._roofline_s(kind, self.target, tokens) / self._roofline_s(kind, self.source, tokens)
        return total.times(ratio)

    def _prefill_attention_s(self, batch: float, length: float, cached: float) -> float:
        pairs, kv_tokens = batch * length * (length + 2.0 * cached) / 2.0, batch * (length + cached)
        return self._attention_s(self.tables.attention.prefill_s(batch, length, cached), pairs, kv_tokens)

    def _decode_attention_s(self, batch: float, context: float) -> float:
        return self._attention_s(self.tables.attention.decode_s(batch, context), batch * context, batch * context)

    def _attention_s(self, source_s: float, pairs: float, kv_tokens: float) -> float:
        target = self._attention_roofline_s(self.target, pairs, kv_tokens)
        return source_s * target / self._attention_roofline_s(self.source, pairs, kv_tokens)

    def _transfer(self, tokens: int) -> Spread:
        """The activations of so many tokens to the next GPU."""
        ratio = self.source.peer_bytes_per_s / self.target.peer_bytes_per_s
        return self.tables.transfer.at(tokens * self.shape.hidden * HALF_BYTES).times(ratio)

    # ------------------------------------------------------------- rooflines of one layer

    def _roofline_s(self, kind: str, device: Device, tokens: float) -> float:
        shape = self.shape
        if kind == "elementwise":
            return device.roofline_s(0.0, tokens * shape.hidden * HALF_BYTES * _ELEMENTWISE_READS)
        parameters = shape.layer_parameters if kind == "matmul" else shape.embedding_parameters
        return device.roofline_s(2.0 * parameters * tokens, parameters * HALF_BYTES)

    def _attention_roofline_s(self, device: Device, pairs: float, kv_tokens: float) -> float:
        # A product with the keys and one with the values: two operations per number each.
        return device.roofline_s(4.0 * self.shape.hidden * pairs, self.shape.kv_bytes_per_token(1) * kv_tokens)
