"""Tiny random models in Hugging Face directories, with a byte-level tokenizer, for tests.

Vocabulary: the 256 bytes, then <pad>, <bos> and <eos>.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

PAD_ID, BOS_ID, EOS_ID = 256, 257, 258
VOCAB_SIZE = 259
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def write_tiny_llama(
    path: Path,
    *,
    layers: int = 4,
    hidden: int = 32,
    seed: int = 0,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int | None = None,
    tied: bool = False,
    max_positions: int = 256,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int | None = None,
    **config: Any,
) -> Path:
    """Write a random Llama with grouped-query attention; `config` overrides fields of its LlamaConfig."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": intermediate or 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        **_special_ids(),
        **config,
    }
    torch.manual_seed(seed)
    return _save(LlamaForCausalLM(LlamaConfig(**settings)), path, seed, dtype, shard_bytes)


def write_tiny_gpt2(
    path: Path,
    *,
    layers: int = 4,
    hidden: int = 32,
    seed: int = 0,
    heads: int = 4,
    tied: bool = True,
    max_positions: int = 256,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int | None = None,
    **config: Any,
) -> Path:
    """Write a random GPT-2; `config` overrides fields of its GPT2Config."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": max_positions,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        **_special_ids(),
        **config,
    }
    torch.manual_seed(seed)
    return _save(GPT2LMHeadModel(GPT2Config(**settings)), path, seed, dtype, shard_bytes)


def write_tokenizer(path: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: one token per byte, ids equal to the byte values."""
    alphabet = _byte_alphabet()
    vocabulary = {alphabet[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _save(model: PreTrainedModel, path: Path, seed: int, dtype: torch.dtype, shard_bytes: int | None) -> Path:
    # Biases and norms start as zeros and ones, where a wrong one would go unnoticed.
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    logging.disable_progress_bar()
    limit = {} if shard_bytes is None else {"max_shard_size": shard_bytes}
    model.to(dtype).save_pretrained(path, **limit)
    write_tokenizer(path)
    return path


def _special_ids() -> dict[str, int]:
    return {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}


def _byte_alphabet() -> dict[int, str]:
    """The printable character byte-level tokenizers write for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {byte: chr(256 + place) for place, byte in enumerate(others)}
    return {byte: chr(byte) for byte in printable} | shifted
