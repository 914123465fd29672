"""The Llama family: RMS norm, rotary positions, grouped-query attention, gated MLP."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from services.node_agent.engine.torch.attention import Attend
from services.node_agent.engine.torch.load import ModelSpec, rope_type
from services.node_agent.engine.torch.outlet import CLOSED, Outlet
from services.node_agent.engine.torch.stage import ACTIVATIONS, BoundaryWeights, project, widen
from services.node_agent.engine.torch.weights import Weight, WeightLoader


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Weight
    qkv: Weight
    qkv_bias: Weight | None
    output: Weight
    output_bias: Weight | None
    mlp_norm: Weight
    gate_up: Weight
    gate_up_bias: Weight | None
    down: Weight
    down_bias: Weight | None


class LlamaFamily:
    """See stage.Family."""

    def __init__(self, spec: ModelSpec, stage: int, num_stages: int, loader: WeightLoader) -> None:
        self._boundary = BoundaryWeights(spec, stage, num_stages, loader)
        self._eps = float(spec.config.get("rms_norm_eps", 1e-6))
        self._activation = ACTIVATIONS[str(spec.config.get("hidden_act", "silu"))]
        self._heads = spec.num_heads
        self._kv_heads = spec.num_kv_heads
        self._head_dim = spec.head_dim
        self._scale = spec.head_dim**-0.5
        self._layers = [_load_layer(spec, index, loader) for index in spec.layer_range(stage, num_stages)]
        last = stage == num_stages - 1
        self._norm = loader.load(["model.norm.weight"], [(spec.hidden_size,)]) if last else None
        parameter = self._layers[0].qkv.parameter
        self._cos, self._sin = _rotary_tables(spec, parameter.device, parameter.dtype)

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """See stage.Family."""
        del positions
        return self._boundary.embed(token_ids)

    def run_layers(
        self, rows: Tensor, positions: Tensor, attend: Attend, layers: range | None = None, outlet: Outlet = CLOSED
    ) -> Tensor:
        """See stage.Family."""
        cos = self._cos[positions].unsqueeze(1)
        sin = self._sin[positions].unsqueeze(1)
        rows, entering = outlet.fork(rows)
        update: Tensor | None = None
        for index in range(len(self._layers)) if layers is None else layers:
            if update is not None:
                rows = entering = rows + update
            rows = rows + self._attend(index, entering, cos, sin, attend)
            update = self._transform(index, rows)
        assert update is not None
        return outlet.add(rows, update)

    def project(self, rows: Tensor) -> Tensor:
        """See stage.Family."""
        assert self._norm is not None
        return self._boundary.project(_rms_norm(rows, self._norm, self._eps))

    def _attend(self, index: int, rows: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """What a layer's attention adds to its rows."""
        layer, heads, head_dim = self._layers[index], self._heads, self._head_dim
        normed = _rms_norm(rows, layer.input_norm, self._eps)
        qkv = project(normed, layer.qkv, layer.qkv_bias)
        qkv = qkv.view(-1, heads + 2 * self._kv_heads, head_dim)
        rotated = _rotate(qkv[:, : heads + self._kv_heads], cos, sin)
        value = qkv[:, heads + self._kv_heads :]
        attended = attend(index, rotated[:, :heads], rotated[:, heads:], value, self._scale)
        return project(attended.reshape(-1, heads * head_dim), layer.output, layer.output_bias)

    def _transform(self, index: int, rows: Tensor) -> Tensor:
        """What a layer's MLP adds to its rows."""
        layer = self._layers[index]
        normed = _rms_norm(rows, layer.mlp_norm, self._eps)
        gate, up = project(normed, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
        return project(self._activation(gate) * up, layer.down, layer.down_bias)


def _load_layer(spec: ModelSpec, index: int, loader: WeightLoader) -> _Layer:
    base = f"model.layers.{index}"
    hidden, inner = spec.hidden_size, int(spec.config["intermediate_size"])
    query, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim

    def load(module: str, outputs: dict[str, int], inputs: int, bias: bool) -> tuple[Weight, Weight | None]:
        names = [f"{base}.{module}.{name}" for name in outputs]
        matrix = loader.load([f"{name}.weight" for name in names], [(rows, inputs) for rows in outputs.values()])
        if not bias:
            return matrix, None
        return matrix, loader.load([f"{name}.bias" for name in names], [(rows,) for rows in outputs.values()])

    attention_bias, mlp_bias = bool(spec.config.get("attention_bias")), bool(spec.config.get("mlp_bias"))
    qkv, qkv_bias = load("self_attn", {"q_proj": query, "k_proj": kv, "v_proj": kv}, hidden, attention_bias)
    output, output_bias = load("self_attn", {"o_proj": hidden}, query, attention_bias)
    gate_up, gate_up_bias = load("mlp", {"gate_proj": inner, "up_proj": inner}, hidden, mlp_bias)
    down, down_bias = load("mlp", {"down_proj": hidden}, inner, mlp_bias)
    return _Layer(
        input_norm=loader.load([f"{base}.input_layernorm.weight"], [(hidden,)]),
        qkv=qkv,
        qkv_bias=qkv_bias,
        output=output,
        output_bias=output_bias,
        mlp_norm=loader.load([f"{base}.post_attention_layernorm.weight"], [(hidden,)]),
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=down,
        down_bias=down_bias,
    )


def _rms_norm(rows: Tensor, weight: Weight, eps: float) -> Tensor:
    wide = widen(rows)
    if wide is rows:
        return functional.rms_norm(rows, rows.shape[-1:], weight.parameter, eps)
    # Half precision: rounded before the weight is applied, as transformers does.
    return weight.parameter * functional.rms_norm(wide, rows.shape[-1:], None, eps).to(rows.dtype)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (T, heads, head_dim); `sin` carries the sign of the first half."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)


def _rotary_tables(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and signed sin by position, (max_positions, head_dim), computed in float32 as transformers does."""
    frequencies, scaling = _rotary_frequencies(spec)
    angles = torch.arange(spec.max_positions, dtype=torch.float32)[:, None] * frequencies.float()
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    return torch.cat((cos, cos), -1).to(device, dtype), torch.cat((-sin, sin), -1).to(device, dtype)


def _rotary_frequencies(spec: ModelSpec) -> tuple[Tensor, float]:
    if rope_type(spec.config) != "default":
        # Imported here because it doubles the start time of a worker, and most models do without.
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
        from transformers.models.llama.configuration_llama import LlamaConfig

        frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type(spec.config)](LlamaConfig(**spec.config))
        return frequencies, float(scaling)
    rope = spec.config.get("rope_parameters") or spec.config
    theta = float(rope.get("rope_theta", 10000.0))
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    return 1.0 / (theta**exponents), 1.0
