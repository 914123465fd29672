"""An adapter in the terms of peft, without importing it."""

from typing import Any

from services.node_agent.engine.torch.load import ModelSpec
from services.node_agent.engine.training_ops import AdapterSpec

#: Before the names of a full model's modules in an adapter_model.safetensors.
PREFIX = "base_model.model."
#: Names all projections of the model's layers.
ALL_LINEAR = "all-linear"


def target_modules(spec: AdapterSpec, model: ModelSpec) -> list[str]:
    """Projections the adapter has, by the last part of their names; without a choice those that peft takes.

    Raises ValueError for one that the model lacks.
    """
    if spec.target_modules == (ALL_LINEAR,):
        return sorted(model.projections)
    unknown = sorted(set(spec.target_modules).difference(model.projections))
    if unknown:
        known = ", ".join(sorted(model.projections))
        raise ValueError(f"the model has no projection {unknown[0]!r} to adapt; it has {known}, or {ALL_LINEAR}")
    return sorted(spec.target_modules or model.default_lora_targets)


def lora_arguments(spec: AdapterSpec, model: ModelSpec) -> dict[str, Any]:
    """Arguments of a LoraConfig."""
    return {
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": target_modules(spec, model),
        "fan_in_fan_out": model.input_major,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }


def adapter_shapes(spec: AdapterSpec, model: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of all its tensors by their names in an adapter_model.safetensors. Raises ValueError as target_modules."""
    targets = set(target_modules(spec, model))
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in model.parameter_shapes.items():
        module = name.removesuffix(".weight")
        if len(shape) == 2 and module.rpartition(".")[2] in targets:
            inputs, outputs = shape if model.input_major else shape[::-1]
            shapes[f"{PREFIX}{module}.lora_A.weight"] = (spec.rank, inputs)
            shapes[f"{PREFIX}{module}.lora_B.weight"] = (outputs, spec.rank)
    return shapes
