"""Rendering conversations with the model's own Jinja template, sandboxed."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from lemix.errors import ErrorCode, LemixError

_MAX_RENDERED_CHARS = 16 * 1024 * 1024
#: What a template's own code can run into; it belongs to the model, not to us.
_RENDERING_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError,
)  # fmt: skip


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text in some templates; here it only passes its body through."""

    tags = {"generation"}  # noqa: RUF012  jinja2's interface

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The body, unchanged."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled template. Settings of the environment follow the transformers library, for equal output."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """special_tokens: by their names in templates (`bos_token`, ...). Raises ValueError for a broken template."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now(UTC).astimezone().strftime(form)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template cannot be compiled: {error}") from error

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """The conversation as text. Raises INVALID_REQUEST with the template's own words when it refuses."""
        try:
            text = self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except _RENDERING_ERRORS as error:
            raise LemixError(
                ErrorCode.INVALID_REQUEST,
                f"the model's chat template refuses this conversation: {error}",
                param="messages",
            ) from error
        if len(text) > _MAX_RENDERED_CHARS:
            raise LemixError(ErrorCode.INVALID_REQUEST, "the rendered conversation is too long", param="messages")
        return text


def load_chat_template(directory: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
    """The model's template: chat_template.jinja, else `chat_template` of tokenizer_config.json; None: it has none."""
    path = directory / "chat_template.jinja"
    source: Any = path.read_text(encoding="utf-8") if path.exists() else tokenizer_config.get("chat_template")
    if isinstance(source, list):  # several named templates
        source = next((entry.get("template") for entry in source if entry.get("name") == "default"), None)
    if not isinstance(source, str):
        return None
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    values = {name: token_content(tokenizer_config.get(name)) for name in names}
    return ChatTemplate(source, {name: value for name, value in values.items() if value is not None})


def token_content(entry: Any) -> str | None:
    """Text of a special token in tokenizer_config.json: a string, or an object with `content`."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
