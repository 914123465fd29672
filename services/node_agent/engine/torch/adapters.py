"""LoRA adapters of one stage: low-rank updates of its projections, one adapter per training job.

`peft` decides which projections an adapter has, its initial values and its scaling, on a model of empty modules with
the stage's names. The factors are weights of the stage then, versioned like all others and named as in an
`adapter_model.safetensors`. The projections add `scaling * up(down(dropout(rows)))` while an adapter is applied.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from services.node_agent.engine.torch.linear import linear
from services.node_agent.engine.torch.load import ModelSpec
from services.node_agent.engine.torch.lora_config import PREFIX, lora_arguments
from services.node_agent.engine.torch.weights import Weight, WeightSet
from services.node_agent.engine.training_ops import AdapterSpec

#: Adapters a stage holds at most. A backstop: the agent refuses further ones before.
MAX_ADAPTERS = 64


@dataclass(frozen=True, slots=True)
class _Factors:
    """The update of one projection, which is the `part`-th of those that a weight joins."""

    target: Weight
    part: int
    down: Weight
    up: Weight

    @property
    def module(self) -> str:
        """Full-model name of the projection."""
        return self.target.names[self.part].removesuffix(".weight")


@dataclass(frozen=True, slots=True)
class Adapter:
    """One job's. `weights`: its factors, the only ones that the job trains."""

    spec: AdapterSpec
    weights: WeightSet
    scaling: float
    factors: tuple[_Factors, ...]


@dataclass(frozen=True, slots=True)
class Use:
    """An adapter in one forward. rows: indices of those it applies to, None: all.

    dropout_key: what the dropout depends on beside the projection, so that a forward that is made again drops the same;
    empty: no dropout.
    """

    adapter: Adapter
    rows: Tensor | None = None
    dropout_key: str = ""

    def within(self, key: str) -> "Use":
        """The same for a part of the forward."""
        return replace(self, dropout_key=f"{self.dropout_key}/{key}") if self.dropout_key else self


@dataclass(slots=True)
class Adapters:
    """All adapters of a stage, by id in the order in which they came. `base`: the weights they apply to."""

    model: ModelSpec
    base: WeightSet
    device: torch.device
    dtype: torch.dtype
    _adapters: dict[str, Adapter] = field(default_factory=dict)

    # ------------------------------------------------------------- which there are

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._adapters.values())

    @property
    def ids(self) -> tuple[str, ...]:
        """Their ids."""
        return tuple(self._adapters)

    def get(self, adapter_id: str) -> Adapter:
        """Raises KeyError for an unknown one."""
        adapter = self._adapters.get(adapter_id)
        if adapter is None:
            raise KeyError(f"no adapter {adapter_id} on this stage")
        return adapter

    def ensure(self, spec: AdapterSpec) -> Adapter:
        """The adapter, made with its initial values if it is new; they depend on its id and the projection alone.

        Raises ValueError for targets the model lacks, when the adapter is known with another spec, or for too many.
        """
        known = self._adapters.get(spec.adapter_id)
        if known is None:
            if len(self._adapters) >= MAX_ADAPTERS:
                raise ValueError(f"{MAX_ADAPTERS} adapters are on this stage; delete one first")
            known = self._adapters[spec.adapter_id] = self._make(spec)
        elif known.spec != spec:
            raise ValueError(f"adapter {spec.adapter_id} changed from {known.spec} to {spec}")
        return known

    def forget(self, ids: Sequence[str]) -> None:
        """Drop adapters by id; unknown ids are ignored."""
        for name in ids:
            self._adapters.pop(name, None)

    def online(self) -> list[Use]:
        """What every request for the model itself runs with."""
        return [Use(adapter) for adapter in self if not adapter.spec.isolated]

    def of(self, adapter: Adapter | None, dropout_key: str = "") -> list[Use]:
        """What a micro-batch that trains this adapter (None: the weights themselves) runs with."""
        if adapter is None:
            return self.online()
        key = dropout_key if adapter.spec.dropout else ""
        if adapter.spec.isolated:
            return [Use(adapter, dropout_key=key)]
        return [Use(use.adapter, dropout_key=key if use.adapter is adapter else "") for use in self.online()]

    # ------------------------------------------------------------- versions

    def advance(self, oldest_version: int | None) -> None:
        """As WeightSet.advance, for every adapter."""
        for adapter in self:
            adapter.weights.advance(oldest_version)

    @contextmanager
    def at(self, version: int) -> Iterator[None]:
        """Every reader sees the adapters of this version; before it was made, one had its initial values."""
        with ExitStack() as stack:
            for adapter in self:
                stack.enter_context(adapter.weights.at(max(version, adapter.weights.versions[0])))
            yield

    # ------------------------------------------------------------- applying

    @contextmanager
    def applied(self, uses: Sequence[Use]) -> Iterator[None]:
        """The stage's projections add these adapters."""
        updates: dict[int, _Update] = {}
        for use in uses:
            for factors in use.adapter.factors:
                update = updates.get(id(factors.target))
                if update is None:
                    update = updates[id(factors.target)] = factors.target.update = _Update(factors.target)
                update.terms.append((factors, use))
        try:
            yield
        finally:
            for update in updates.values():
                update.target.update = None

    # ------------------------------------------------------------- making

    def _make(self, spec: AdapterSpec) -> Adapter:
        # Imported here because it takes seconds, and most stages never train an adapter.
        from peft import LoraConfig, inject_adapter_in_model

        root = nn.Module()
        with torch.device("meta"):
            for weight, part in self._projections():
                _place(root, weight.names[part].removesuffix(".weight"), self._module(weight, part))
        inject_adapter_in_model(LoraConfig(**lora_arguments(spec, self.model)), root)
        found = [self._factors(root, spec, weight, part) for weight, part in self._projections()]
        factors = tuple(item for item in found if item is not None)
        weights = WeightSet(
            tuple(weight for item in factors for weight in (item.down, item.up)), version=self.base.version
        )
        return Adapter(spec, weights, spec.alpha / spec.rank, factors)

    def _projections(self) -> Iterator[tuple[Weight, int]]:
        for weight in self.base.weights:
            for part, name in enumerate(weight.names):
                if name.rsplit(".", 2)[-2] in self.model.projections and name.endswith(".weight"):
                    yield weight, part

    def _module(self, weight: Weight, part: int) -> nn.Module:
        """An empty module of the projection's kind and shape."""
        if self.model.input_major:
            from transformers.pytorch_utils import Conv1D

            inputs, outputs = weight.parameter.shape
            empty: nn.Module = Conv1D(outputs, inputs)
            return empty
        return nn.Linear(weight.parameter.shape[1], weight.rows[part], bias=False)

    def _factors(self, root: nn.Module, spec: AdapterSpec, target: Weight, part: int) -> _Factors | None:
        """What peft made of a projection; None: it is no target."""
        module = target.names[part].removesuffix(".weight")
        layer: Any = root.get_submodule(module)
        if not hasattr(layer, "lora_A"):
            return None
        layer.lora_A.to_empty(device="cpu")
        layer.lora_B.to_empty(device="cpu")
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(_seed(spec.adapter_id, module))
            layer.reset_lora_parameters("default", True)
        # As in peft, never narrower than float32: steps are too small for half precision.
        dtype = torch.promote_types(self.dtype, torch.float32)
        down, up = (
            Weight(
                (f"{PREFIX}{module}.{name}.weight",),
                (len(values),),
                nn.Parameter(values.detach().to(self.device, dtype, copy=True)),
            )
            for name, values in (("lora_A", layer.lora_A.default.weight), ("lora_B", layer.lora_B.default.weight))
        )
        return _Factors(target, part, down, up)


@dataclass(slots=True)
class _Update:
    """What is added to the output of one weight's projections."""

    target: Weight
    terms: list[tuple[_Factors, Use]] = field(default_factory=list)

    def __call__(self, rows: Tensor, output: Tensor) -> Tensor:
        """rows (T, inputs), output (T, outputs of all parts)."""
        widths = self.target.rows if len(self.target.rows) > 1 else (output.shape[1],)
        parts = list(torch.split(output, list(widths), dim=1))
        for factors, use in self.terms:
            chosen = rows if use.rows is None else rows[use.rows]
            added = _low_rank(factors, use, chosen).to(output.dtype)
            part = parts[factors.part]
            parts[factors.part] = part + added if use.rows is None else part.index_add(0, use.rows, added)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _low_rank(factors: _Factors, use: Use, rows: Tensor) -> Tensor:
    rows = rows.to(factors.down.parameter.dtype)
    if use.dropout_key:
        rows = rows * _kept(rows, use.adapter.spec.dropout, f"{use.dropout_key}/{factors.module}")
    low = linear(rows, factors.down.parameter)
    return linear(low, factors.up.parameter) * use.adapter.scaling


def _kept(rows: Tensor, dropout: float, key: str) -> Tensor:
    """What remains of each element: 0 or 1 / (1 - dropout)."""
    generator = torch.Generator(rows.device).manual_seed(_seed(key))
    kept = torch.empty_like(rows, requires_grad=False).bernoulli_(1.0 - dropout, generator=generator)
    return kept.div_(1.0 - dropout)


def _seed(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("/".join(parts).encode()).digest()[:8]) >> 1


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module where its name says, with empty ones above it."""
    *path, last = name.split(".")
    at = root
    for step in path:
        if step not in dict(at.named_children()):
            at.add_module(step, nn.Module())
        at = at.get_submodule(step)
    at.add_module(last, module)
