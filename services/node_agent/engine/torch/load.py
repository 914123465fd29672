"""Reads what a Hugging Face model directory says about its model, without loading torch or any weight.

Local files only. Supported: Llama and GPT-2 causal language models with safetensors weights (one file, or shards with
an index) and a tokenizer.json.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from services.node_agent.engine.base import EngineConfig, ModelInfo

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "GPT2LMHeadModel")
_ARCHITECTURE_OF_TYPE = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}
_BASE_PREFIX = {"LlamaForCausalLM": "model.", "GPT2LMHeadModel": "transformer."}
#: Projections of a layer, and those that LoRA adapts where nobody chooses (as in peft).
_PROJECTIONS = {
    "LlamaForCausalLM": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "GPT2LMHeadModel": ("c_attn", "c_proj", "c_fc"),
}
_LORA_TARGETS = {"LlamaForCausalLM": ("q_proj", "v_proj"), "GPT2LMHeadModel": ("c_attn",)}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
_INDEX_FILE = "model.safetensors.index.json"


class ModelDirectoryError(ValueError):
    """A model directory this engine cannot load; the message names the path and what is wrong."""


@dataclass(frozen=True)
class ModelSpec:
    """Shape of a model, and where each of its tensors lies. Sizes are element counts."""

    path: Path
    architecture: str
    config: dict[str, Any]
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    #: The output projection is the embedding.
    tied: bool
    eos_token_ids: tuple[int, ...]
    #: Full-model parameter name -> file that holds it.
    files: dict[str, Path]

    @property
    def embedding_name(self) -> str:
        """Full-model name of the token embedding."""
        return "model.embed_tokens.weight" if self.architecture == "LlamaForCausalLM" else "transformer.wte.weight"

    @property
    def head_name(self) -> str:
        """Full-model name of the output projection; the embedding's when they are tied."""
        return self.embedding_name if self.tied else "lm_head.weight"

    @property
    def projections(self) -> tuple[str, ...]:
        """Last parts of the names of the layers' projections."""
        return _PROJECTIONS[self.architecture]

    @property
    def default_lora_targets(self) -> tuple[str, ...]:
        """Projections that LoRA adapts where nobody chooses."""
        return _LORA_TARGETS[self.architecture]

    @property
    def input_major(self) -> bool:
        """Whether the projections are stored (inputs, outputs)."""
        return self.architecture == "GPT2LMHeadModel"

    @cached_property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the trainable parameters by full-model name; a tied projection is not listed."""
        shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(self.files.values())):
            with _open(file) as tensors:
                for stored in tensors.keys():  # noqa: SIM118  (not a mapping)
                    name = _full_name(stored, self.architecture)
                    if self.files.get(name) == file and self._is_parameter(name):
                        shapes[name] = tuple(tensors.get_slice(stored).get_shape())
        return shapes

    def _is_parameter(self, name: str) -> bool:
        if name == "lm_head.weight":
            return not self.tied
        return not name.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"))

    def info(self, max_context_tokens: int = 0) -> ModelInfo:
        """What the agent needs to know; `max_context_tokens` 0: the model's own limit."""
        return ModelInfo(
            architecture=self.architecture,
            num_layers=self.num_layers,
            vocab_size=self.vocab_size,
            max_context_tokens=min(max_context_tokens or self.max_positions, self.max_positions),
            num_parameters=sum(prod(shape) for shape in self.parameter_shapes.values()),
            eos_token_ids=self.eos_token_ids,
            projections=self.projections,
        )

    def layer_range(self, stage: int, num_stages: int) -> range:
        """Layers of a stage: contiguous, sizes differ by at most one, the earlier stages take the extra ones
        because the last one also computes the output projection."""
        base, extra = divmod(self.num_layers, num_stages)
        first = stage * base + min(stage, extra)
        return range(first, first + base + (1 if stage < extra else 0))


def read_model(path_name: str) -> ModelSpec:
    """Check a model directory and describe its model. Raises ModelDirectoryError."""
    path = Path(path_name)
    if not path.is_dir():
        raise ModelDirectoryError(f"model directory {path} does not exist")
    config = _read_json(path, "config.json")
    architecture = _architecture(path, config)
    if not (path / "tokenizer.json").is_file():
        raise ModelDirectoryError(f"{path} has no tokenizer.json; save the model's fast tokenizer beside its weights")
    try:
        shape = _llama_shape(config) if architecture == "LlamaForCausalLM" else _gpt2_shape(config)
    except KeyError as error:
        raise ModelDirectoryError(f"{path / 'config.json'} lacks the field {error}") from None
    _check_features(path, config, architecture)
    return ModelSpec(
        path=path,
        architecture=architecture,
        config=config,
        eos_token_ids=_eos_token_ids(path, config),
        files=_weight_files(path, architecture),
        **shape,
    )


def check_engine_config(config: EngineConfig, spec: ModelSpec) -> None:
    """Raise ModelDirectoryError or ValueError when the model cannot be cut or placed as asked."""
    if config.num_stages < 1:
        raise ValueError(f"num_stages is {config.num_stages}; it must be at least 1")
    if config.num_stages > spec.num_layers:
        raise ModelDirectoryError(
            f"num_stages is {config.num_stages} but the model in {spec.path} has {spec.num_layers} layers; "
            "every stage needs at least one"
        )
    if len(config.devices) not in (1, config.num_stages):
        raise ValueError(f"{len(config.devices)} devices for {config.num_stages} stages; name one, or one per stage")
    if config.cpus and len(config.cpus) != config.num_stages:
        raise ValueError(f"{len(config.cpus)} cpus for {config.num_stages} stages; name one per stage, or none")


def _architecture(path: Path, config: dict[str, Any]) -> str:
    named = config.get("architectures") or [_ARCHITECTURE_OF_TYPE.get(str(config.get("model_type")), "")]
    architecture = str(named[0] or config.get("model_type"))
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ModelDirectoryError(
            f"{path} holds a {architecture}, which this engine does not support; "
            f"it supports {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    return architecture


def _llama_shape(config: dict[str, Any]) -> dict[str, Any]:
    heads = int(config["num_attention_heads"])
    return {
        "num_layers": int(config["num_hidden_layers"]),
        "hidden_size": int(config["hidden_size"]),
        "num_heads": heads,
        "num_kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or config["hidden_size"] // heads),
        "vocab_size": int(config["vocab_size"]),
        "max_positions": int(config["max_position_embeddings"]),
        "tied": bool(config.get("tie_word_embeddings", False)),
    }


def _gpt2_shape(config: dict[str, Any]) -> dict[str, Any]:
    heads = int(config["n_head"])
    return {
        "num_layers": int(config["n_layer"]),
        "hidden_size": int(config["n_embd"]),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": int(config["n_embd"]) // heads,
        "vocab_size": int(config["vocab_size"]),
        "max_positions": int(config["n_positions"]),
        "tied": bool(config.get("tie_word_embeddings", True)),
    }


def _check_features(path: Path, config: dict[str, Any], architecture: str) -> None:
    activation = str(
        config.get("hidden_act", "silu")
        if architecture == "LlamaForCausalLM"
        else config.get("activation_function", "gelu_new")
    )
    if activation not in _ACTIVATIONS:
        raise ModelDirectoryError(f"{path} uses the activation {activation!r}; supported: {', '.join(_ACTIVATIONS)}")
    if config.get("add_cross_attention"):
        raise ModelDirectoryError(f"{path} uses cross attention, which this engine does not support")
    rope = rope_type(config)
    if rope not in _ROPE_TYPES:
        raise ModelDirectoryError(f"{path} uses rope type {rope!r}; supported: {', '.join(_ROPE_TYPES)}")


def rope_type(config: dict[str, Any]) -> str:
    """Kind of rotary embedding a Llama config asks for."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _eos_token_ids(path: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """End-of-sequence tokens, from generation_config.json where it has them, as generation in transformers does."""
    source = config
    if (path / "generation_config.json").is_file():
        generation = _read_json(path, "generation_config.json")
        source = generation if generation.get("eos_token_id") is not None else config
    eos = source.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(int(token) for token in eos) if isinstance(eos, list) else (int(eos),)


def _weight_files(path: Path, architecture: str) -> dict[str, Path]:
    if (path / _INDEX_FILE).is_file():
        stored = {name: path / str(file) for name, file in _read_json(path, _INDEX_FILE)["weight_map"].items()}
    elif (path / "model.safetensors").is_file():
        with _open(path / "model.safetensors") as tensors:
            stored = dict.fromkeys(tensors.keys(), path / "model.safetensors")
    else:
        raise ModelDirectoryError(f"{path} has no weights: neither model.safetensors nor {_INDEX_FILE}")
    for file in sorted(set(stored.values())):
        if not file.is_file():
            raise ModelDirectoryError(f"{path / _INDEX_FILE} names {file.name}, which is missing")
    return {_full_name(name, architecture): file for name, file in stored.items()}


def _full_name(stored: str, architecture: str) -> str:
    """Checkpoints saved from the bare transformer lack the prefix of the language model around it."""
    prefix = _BASE_PREFIX[architecture]
    return stored if stored.startswith((prefix, "lm_head.")) else prefix + stored


def stored_name(full_name: str, available: set[str], architecture: str) -> str:
    """Name under which a file holds a full-model parameter."""
    return full_name if full_name in available else full_name.removeprefix(_BASE_PREFIX[architecture])


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise ModelDirectoryError(f"{file} is not a readable safetensors file: {error}") from error


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((path / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelDirectoryError(f"{path} has no {name}") from None
    except ValueError as error:
        raise ModelDirectoryError(f"{path / name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelDirectoryError(f"{path / name} is not a JSON object")
    return content
