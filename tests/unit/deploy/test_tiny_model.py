"""The tiny model is an ordinary Hugging Face directory."""

import json

import pytest
from safetensors import safe_open

from deploy.local.tiny_model import SPECIAL_TOKENS, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    write_tiny_model(path, hidden=32, layers=1, max_context_tokens=64)
    return path


@pytest.fixture(scope="module")
def tokenizer(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, local_files_only=True)


def test_the_directory_is_complete_and_readable_by_anyone(model):
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in model.iterdir()} == names
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in model.iterdir())
    config = json.loads((model / "config.json").read_text())
    assert (config["architectures"], config["max_position_embeddings"]) == (["LlamaForCausalLM"], 64)


@pytest.mark.parametrize("text", ["Hello", "  two  spaces\n\ttab", "héllo wörld ☃ 🎉", "\x00\x01", "a" * 300])
def test_every_text_survives_and_takes_a_token_per_byte(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_special_tokens_and_the_chat_template(tokenizer):
    assert [tokenizer(token).input_ids for token in SPECIAL_TOKENS] == [[256], [257], [258], [259]]
    assert tokenizer.eos_token_id == 256
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>be kind<|end|><|user|>hi<|end|><|assistant|>"


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone(model, tmp_path):
    import torch

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    write_tiny_model(tmp_path / "same", hidden=32, layers=1, max_context_tokens=64)
    assert torch.equal(torch.rand(1), expected)
    write_tiny_model(tmp_path / "other", hidden=32, layers=1, max_context_tokens=64, seed=1)

    def embedding(path):
        with safe_open(path / "model.safetensors", framework="pt") as tensors:
            return tensors.get_tensor("model.embed_tokens.weight")

    assert embedding(model).shape == (260, 32)
    assert torch.equal(embedding(model), embedding(tmp_path / "same"))
    assert not torch.equal(embedding(model), embedding(tmp_path / "other"))


def test_a_directory_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "stale").touch()
    write_tiny_model(path, hidden=32, layers=1)
    assert not (path / "stale").exists()
    assert [item.name for item in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize("hidden", [0, 16, 48, -32])
def test_an_unusable_width_is_refused(tmp_path, hidden):
    with pytest.raises(ValueError, match="multiple of 32"):
        write_tiny_model(tmp_path / "tiny", hidden=hidden)
