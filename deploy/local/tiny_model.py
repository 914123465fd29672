"""A tiny Llama with random weights and a byte-level tokenizer, as an ordinary Hugging Face directory."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

#: End of a turn and of a text; the roles of a conversation.
SPECIAL_TOKENS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tiny_model(
    path: Path, *, hidden: int = 64, layers: int = 2, max_context_tokens: int = 512, seed: int = 0
) -> None:
    """Write config.json, generation_config.json, model.safetensors, tokenizer.json and tokenizer_config.json.

    The tokenizer has one token per byte and the special tokens: no text is unknown to it. `hidden` is a multiple of 32
    (32 per attention head). The directory appears whole or not at all; an existing one is replaced. The same arguments
    give the same weights.
    """
    if hidden < 32 or hidden % 32 != 0:
        raise ValueError(f"hidden must be a positive multiple of 32, not {hidden}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        temporary.chmod(0o755)
        write_tokenizer(temporary, max_context_tokens)
        _write_weights(temporary, hidden, layers, max_context_tokens, seed)
        if path.exists():
            shutil.rmtree(path)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_tokenizer(path: Path, max_context_tokens: int, *, vocab_size: int = 0) -> None:
    """tokenizer.json and tokenizer_config.json of one token per byte and the special tokens.

    vocab_size: further tokens up to so many, " t<id>", which no text becomes. Raises ValueError when that is too few.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *SPECIAL_TOKENS]
    if vocab_size and vocab_size < len(tokens):
        raise ValueError(f"a tokenizer of bytes needs {len(tokens)} tokens, not {vocab_size}")
    # The byte-level alphabet writes a space so.
    tokens += [f"\u0120t{token_id}" for token_id in range(len(tokens), vocab_size)]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(path / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS[0],
        "pad_token": SPECIAL_TOKENS[0],
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": max_context_tokens,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _write_weights(path: Path, hidden: int, layers: int, max_context_tokens: int, seed: int) -> None:
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    end = 256  # the first special token follows the 256 bytes
    config = LlamaConfig(
        vocab_size=256 + len(SPECIAL_TOKENS),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=max_context_tokens,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    logging.disable_progress_bar()
    model.save_pretrained(path)
    for file in path.iterdir():
        file.chmod(0o644)  # a container's user reads them too
