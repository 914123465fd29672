"""A model directory as the gateway sees one: a byte-level tokenizer, a chat template, a config. No weights."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
BOS, EOS = 256, 257
MERGED = (("h", "e"), ("l", "l"), ("ll", "o"), ("Ġ", "w"))


def byte_tokenizer() -> Tokenizer:
    """One token per byte (256 of them, in byte order), `<s>`, `</s>`, and a few merges."""
    alphabet = _byte_alphabet()
    vocabulary = {alphabet[byte]: byte for byte in range(256)}
    vocabulary |= {"<s>": BOS, "</s>": EOS}
    for left, right in MERGED:
        vocabulary[left + right] = 258 + MERGED.index((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(MERGED)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [
        {"id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for number, content in ((BOS, "<s>"), (EOS, "</s>"))
    ]  # fmt: skip
    return Tokenizer.from_str(json.dumps(raw))


def write_model(directory: Path, *, context: int = 256, chat: bool = True) -> Path:
    """Write tokenizer.json, tokenizer_config.json, config.json and, with `chat`, chat_template.jinja."""
    directory.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": None})
    )
    (directory / "config.json").write_text(
        json.dumps({"max_position_embeddings": context, "vocab_size": 262, "eos_token_id": EOS})
    )
    if chat:
        (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


def _byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level vocabularies."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
