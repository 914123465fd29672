"""What a model directory must hold, and what is said when it does not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from services.node_agent.engine.base import EngineConfig
from services.node_agent.engine.torch.engine import load_inprocess_engine, profile_fingerprint
from services.node_agent.engine.torch.load import ModelDirectoryError, check_engine_config, read_model
from tests.parity.tiny import EOS_ID, VOCAB_SIZE, write_tiny_gpt2, write_tiny_llama


def edit_config(path: Path, **fields: Any) -> None:
    """Change fields of config.json; None removes one."""
    config = json.loads((path / "config.json").read_text())
    config.update(fields)
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_describes_llama(tmp_path: Path) -> None:
    info = read_model(str(write_tiny_llama(tmp_path, layers=3))).info()
    assert (info.architecture, info.num_layers, info.vocab_size) == ("LlamaForCausalLM", 3, VOCAB_SIZE)
    assert (info.max_context_tokens, info.eos_token_ids) == (256, (EOS_ID,))
    layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 64 + 2 * 32
    assert info.num_parameters == 3 * layer + 2 * VOCAB_SIZE * 32 + 32


def test_tied_projection_counts_once_and_context_is_capped(tmp_path: Path) -> None:
    info = read_model(str(write_tiny_gpt2(tmp_path, layers=1))).info(max_context_tokens=100)
    layer = 2 * 64 + 32 * 96 + 96 + 32 * 32 + 32 + 2 * 32 * 128 + 128 + 32
    assert info.num_parameters == layer + VOCAB_SIZE * 32 + 256 * 32 + 64
    assert info.max_context_tokens == 100


def test_eos_of_the_generation_config_wins(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path, layers=1)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert read_model(str(path)).eos_token_ids == (3, 4)
    (path / "generation_config.json").write_text("{}")
    assert read_model(str(path)).eos_token_ids == (EOS_ID,)


def test_layers_are_cut_evenly_earlier_stages_first(tmp_path: Path) -> None:
    spec = read_model(str(write_tiny_llama(tmp_path, layers=5)))
    assert [list(spec.layer_range(stage, 3)) for stage in range(3)] == [[0, 1], [2, 3], [4]]


def _no_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()


def _no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def _bad_json(path: Path) -> None:
    (path / "config.json").write_text("{")


def _json_list(path: Path) -> None:
    (path / "config.json").write_text("[]")


def _broken_weights(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"nothing")


def _missing_shard(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}})
    )


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (_no_tokenizer, "tokenizer.json"),
    (_no_weights, "no weights"),
    (_bad_json, "not valid JSON"),
    (_json_list, "not a JSON object"),
    (_broken_weights, "not a readable safetensors"),
    (_missing_shard, "gone.safetensors"),
    (lambda path: (path / "config.json").unlink(), "no config.json"),
    (
        lambda path: edit_config(path, architectures=["MixtralForCausalLM"]),
        "MixtralForCausalLM.*supports LlamaForCausalLM",
    ),
    (lambda path: edit_config(path, architectures=None, model_type="mamba"), "mamba"),
    (lambda path: edit_config(path, hidden_size=None), "hidden_size"),
    (lambda path: edit_config(path, hidden_act="swish9"), "swish9"),
    (lambda path: edit_config(path, rope_parameters={"rope_type": "longrope"}), "longrope"),
    (lambda path: edit_config(path, add_cross_attention=True), "cross attention"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_unusable_directory_is_named_with_its_fault(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    path = write_tiny_llama(tmp_path, layers=1)
    damage(path)
    with pytest.raises(ModelDirectoryError, match=message) as raised:
        read_model(str(path))
    assert str(path) in str(raised.value)


def test_unknown_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelDirectoryError, match="absent does not exist"):
        read_model(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_stages": 3}, "num_stages is 3 but the model in .* has 2 layers"),
        ({"num_stages": 0}, "at least 1"),
        ({"num_stages": 2, "devices": ("cpu", "cpu", "cpu")}, "3 devices for 2 stages"),
        ({"num_stages": 2, "cpus": (0,)}, "1 cpus for 2 stages"),
    ],
)
def test_impossible_cut(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    path = write_tiny_llama(tmp_path, layers=2)
    with pytest.raises(ValueError, match=message):
        check_engine_config(EngineConfig(model_path=str(path), **fields), read_model(str(path)))


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_weights_that_do_not_fit_the_config(tmp_path: Path, fault: str) -> None:
    path = write_tiny_llama(tmp_path, layers=1)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensor = tensors.pop(name)
    if fault == "shape":
        tensors[name] = tensor[:-1].clone()
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ModelDirectoryError, match=name):
        load_inprocess_engine(EngineConfig(model_path=str(path)))


def test_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown dtype 'int4'; known: float32"):
        load_inprocess_engine(EngineConfig(model_path=str(write_tiny_llama(tmp_path, layers=1)), dtype="int4"))


def test_checkpoint_without_the_language_model_prefix(tmp_path: Path) -> None:
    """As the original GPT-2 files are stored, with attention masks among the weights."""
    path = write_tiny_gpt2(tmp_path, layers=1)
    tensors = load_file(path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = tensors["transformer.ln_f.bias"].clone()
    save_file(bare, path / "model.safetensors")
    spec = read_model(str(path))
    assert set(spec.parameter_shapes) == set(tensors)
    load_inprocess_engine(EngineConfig(model_path=str(path)))


def test_fingerprint_follows_what_durations_depend_on(tmp_path: Path) -> None:
    small, large = write_tiny_llama(tmp_path / "small"), write_tiny_llama(tmp_path / "large", hidden=64)
    other_seed = write_tiny_llama(tmp_path / "seed", seed=1)

    def fingerprint(path: Path, **fields: Any) -> str:
        return profile_fingerprint(EngineConfig(model_path=str(path), **fields), read_model(str(path)).info())

    base = fingerprint(small)
    assert fingerprint(small, kv_capacity_tokens=1, seed=5) == base
    assert fingerprint(other_seed) == base
    changed = [
        fingerprint(large),
        fingerprint(small, num_stages=2),
        fingerprint(small, dtype="bfloat16"),
        fingerprint(small, threads_per_stage=2),
        fingerprint(small, devices=("cuda:0",)),
    ]
    assert len({base, *changed}) == 6
