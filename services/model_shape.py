"""Sizes of a Llama-like model from its config.json: parameters, and bytes per token. Pure arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Bytes of a number in the weights, the KV cache and the activations of a GPU: bfloat16.
HALF_BYTES = 2


@dataclass(frozen=True, slots=True)
class ModelShape:
    """hidden, intermediate: widths; kv_hidden: width of keys, and of values."""

    num_layers: int
    hidden: int
    intermediate: int
    kv_hidden: int
    vocab_size: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelShape":
        """From the content of a Hugging Face config.json. Raises ValueError naming the key that is missing or wrong."""

        def whole(key: str, default: object = None) -> int:
            value = config.get(key)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{key} must be a whole number from 1 on, not {value!r}")
            return value

        hidden, heads = whole("hidden_size"), whole("num_attention_heads")
        kv_heads = whole("num_key_value_heads", heads)
        head = whole("head_dim", hidden // heads)
        intermediate = whole("intermediate_size", 4 * hidden)
        return cls(whole("num_hidden_layers"), hidden, intermediate, kv_heads * head, whole("vocab_size"))

    def layers_of(self, stage: int, num_stages: int) -> int:
        """Layers of a stage when they are spread evenly, the first stages taking one more."""
        return self.num_layers // num_stages + (stage < self.num_layers % num_stages)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer: query, key, value and output projections, gated MLP, two norms."""
        attention = 2 * self.hidden * (self.hidden + self.kv_hidden)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding; those of the head are as many."""
        return self.vocab_size * self.hidden

    def stage_parameters(self, stage: int, num_stages: int) -> int:
        """Parameters of a stage; the first one has the embedding, the last one the head."""
        ends = (stage == 0) + (stage == num_stages - 1)
        return self.layers_of(stage, num_stages) * self.layer_parameters + ends * self.embedding_parameters

    def kv_bytes_per_token(self, num_layers: int) -> int:
        """Keys and values of one token in so many layers."""
        return num_layers * 2 * self.kv_hidden * HALF_BYTES

    def activation_bytes_per_token(self, num_layers: int) -> int:
        """What so many layers keep of one token for their backward, with fused attention and no checkpointing.

        Per layer: what enters both norms and both blocks and what attention returns (5 times hidden), queries, keys and
        values, and of the MLP both products, the gate and what enters the last projection (4 times intermediate).
        """
        numbers = 6 * self.hidden + 2 * self.kv_hidden + 4 * self.intermediate
        return num_layers * numbers * HALF_BYTES
