"""The GPT-2 family: layer norm, learned positions, joint attention projection (matrices stored input-major)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from services.node_agent.engine.torch.attention import Attend
from services.node_agent.engine.torch.load import ModelSpec
from services.node_agent.engine.torch.outlet import CLOSED, Outlet
from services.node_agent.engine.torch.stage import ACTIVATIONS, BoundaryWeights
from services.node_agent.engine.torch.weights import Weight, WeightLoader


@dataclass(frozen=True, slots=True)
class _Affine:
    weight: Weight
    bias: Weight


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: _Affine
    qkv: _Affine
    output: _Affine
    mlp_norm: _Affine
    up: _Affine
    down: _Affine
    scale: float


class Gpt2Family:
    """See stage.Family."""

    def __init__(self, spec: ModelSpec, stage: int, num_stages: int, loader: WeightLoader) -> None:
        self._boundary = BoundaryWeights(spec, stage, num_stages, loader)
        hidden = spec.hidden_size
        self._positions = (
            loader.load(["transformer.wpe.weight"], [(spec.max_positions, hidden)]) if stage == 0 else None
        )
        self._eps = float(spec.config.get("layer_norm_epsilon", 1e-5))
        self._activation = ACTIVATIONS[str(spec.config.get("activation_function", "gelu_new"))]
        self._heads = spec.num_heads
        self._head_dim = spec.head_dim
        self._layers = [_load_layer(spec, index, loader) for index in spec.layer_range(stage, num_stages)]
        last = stage == num_stages - 1
        self._norm = _load_affine(loader, "transformer.ln_f", (hidden,), hidden) if last else None

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """See stage.Family."""
        assert self._positions is not None
        return self._boundary.embed(token_ids) + functional.embedding(positions, self._positions.parameter)

    def run_layers(
        self, rows: Tensor, positions: Tensor, attend: Attend, layers: range | None = None, outlet: Outlet = CLOSED
    ) -> Tensor:
        """See stage.Family."""
        del positions
        rows, entering = outlet.fork(rows)
        update: Tensor | None = None
        for index in range(len(self._layers)) if layers is None else layers:
            if update is not None:
                rows = entering = rows + update
            rows = rows + self._attend(index, entering, attend)
            update = self._transform(index, rows)
        assert update is not None
        return outlet.add(rows, update)

    def project(self, rows: Tensor) -> Tensor:
        """See stage.Family."""
        assert self._norm is not None
        return self._boundary.project(self._normalise(rows, self._norm))

    def _attend(self, index: int, rows: Tensor, attend: Attend) -> Tensor:
        """What a layer's attention adds to its rows."""
        layer = self._layers[index]
        qkv = _affine(self._normalise(rows, layer.attention_norm), layer.qkv)
        query, key, value = torch.split(qkv.view(-1, 3 * self._heads, self._head_dim), self._heads, dim=1)
        attended = attend(index, query, key, value, layer.scale)
        return _affine(attended.reshape(-1, self._heads * self._head_dim), layer.output)

    def _transform(self, index: int, rows: Tensor) -> Tensor:
        """What a layer's MLP adds to its rows."""
        layer = self._layers[index]
        inner = self._activation(_affine(self._normalise(rows, layer.mlp_norm), layer.up))
        return _affine(inner, layer.down)

    def _normalise(self, rows: Tensor, norm: _Affine) -> Tensor:
        return functional.layer_norm(rows, rows.shape[-1:], norm.weight.parameter, norm.bias.parameter, self._eps)


def _affine(rows: Tensor, affine: _Affine) -> Tensor:
    output = torch.addmm(affine.bias.parameter, rows, affine.weight.parameter)
    return output if affine.weight.update is None else affine.weight.update(rows, output)


def _load_affine(loader: WeightLoader, name: str, shape: tuple[int, ...], outputs: int) -> _Affine:
    return _Affine(loader.load([f"{name}.weight"], [shape]), loader.load([f"{name}.bias"], [(outputs,)]))


def _load_layer(spec: ModelSpec, index: int, loader: WeightLoader) -> _Layer:
    base = f"transformer.h.{index}"
    hidden = spec.hidden_size
    inner = int(spec.config.get("n_inner") or 4 * hidden)
    scale = spec.head_dim**-0.5 if spec.config.get("scale_attn_weights", True) else 1.0
    if spec.config.get("scale_attn_by_inverse_layer_idx"):
        scale /= index + 1
    return _Layer(
        attention_norm=_load_affine(loader, f"{base}.ln_1", (hidden,), hidden),
        qkv=_load_affine(loader, f"{base}.attn.c_attn", (hidden, 3 * hidden), 3 * hidden),
        output=_load_affine(loader, f"{base}.attn.c_proj", (hidden, hidden), hidden),
        mlp_norm=_load_affine(loader, f"{base}.ln_2", (hidden,), hidden),
        up=_load_affine(loader, f"{base}.mlp.c_fc", (hidden, inner), inner),
        down=_load_affine(loader, f"{base}.mlp.c_proj", (inner, hidden), hidden),
        scale=scale,
    )
