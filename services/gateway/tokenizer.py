"""The model's vocabulary as the gateway needs it: text to tokens and back, no weights, no torch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lemix.errors import ErrorCode, LemixError
from services.gateway.chat_template import ChatTemplate, load_chat_template, token_content


class ModelFilesError(ValueError):
    """The model directory lacks something the gateway needs. The message names the file."""


class ModelTokenizer:
    """Vocabulary, chat template and limits of one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        *,
        eos_token_ids: Sequence[int],
        vocab_size: int,
        max_context_tokens: int,
    ) -> None:
        """eos_token_ids: end a sequence; the first is appended in training. max_context_tokens: prompt plus output."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self.eos_token_ids = tuple(eos_token_ids)
        self.vocab_size = vocab_size
        self.max_context_tokens = max_context_tokens
        # Decoders strip a leading space: a token shows its own after another one.
        self._anchor = self.encode("a", add_special_tokens=False)
        self._anchor_text = self.decode(self._anchor)
        self._token_texts: dict[int, str] = {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with special tokens where the tokenizer puts them (a leading BOS, for example)."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a rendered conversation. Raises UNSUPPORTED without a template, INVALID_REQUEST."""
        if self._chat_template is None:
            raise LemixError(
                ErrorCode.UNSUPPORTED, "the model has no chat template; use /v1/completions", param="messages"
            )
        text = self._chat_template.render(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def token_text(self, token_id: int) -> str:
        """Text of one token in the middle of others; bytes that are no whole character show as U+FFFD."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._tokenizer.decode([*self._anchor, token_id], skip_special_tokens=False)
            text = self._token_texts[token_id] = text.removeprefix(self._anchor_text)
        return text


def load_tokenizer(directory: Path, max_context_tokens: int = 0) -> ModelTokenizer:
    """Read a Hugging Face model directory.

    max_context_tokens: 0 takes the model's own. Raises ModelFilesError naming what is missing or broken.
    """
    config = _read_json(directory / "config.json")
    tokenizer_config = _read_json(directory / "tokenizer_config.json", optional=True)
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelFilesError(f"{path} is missing")
    try:
        tokenizer = Tokenizer.from_file(str(path))
        template = load_chat_template(directory, tokenizer_config)
    except Exception as error:
        raise ModelFilesError(f"{path.parent}: {error}") from error
    context = max_context_tokens or config.get("max_position_embeddings") or config.get("n_positions")
    if not isinstance(context, int) or context < 2:
        raise ModelFilesError(
            f"{directory / 'config.json'}: max_position_embeddings is missing; set max_context_tokens"
        )
    return ModelTokenizer(
        tokenizer,
        template,
        eos_token_ids=_eos_token_ids(directory, config, tokenizer_config, tokenizer),
        vocab_size=int(config.get("vocab_size") or tokenizer.get_vocab_size()),
        max_context_tokens=context,
    )


def _eos_token_ids(
    directory: Path, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any], tokenizer: Tokenizer
) -> list[int]:
    """The tokenizer's own end token first, then those the model's files name."""
    found: list[int] = []
    content = token_content(tokenizer_config.get("eos_token"))
    if content is not None and (token_id := tokenizer.token_to_id(content)) is not None:
        found.append(token_id)
    generation_config = _read_json(directory / "generation_config.json", optional=True)
    for source in (config, generation_config):
        value = source.get("eos_token_id")
        found.extend(i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))
    return list(dict.fromkeys(found))


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFilesError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelFilesError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelFilesError(f"{path}: not a JSON object")
    return content
