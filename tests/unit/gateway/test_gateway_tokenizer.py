"""Model directories and chat templates."""

import json
from pathlib import Path

import pytest

from lemix.errors import ErrorCode, LemixError
from services.gateway.chat_template import ChatTemplate
from services.gateway.tokenizer import ModelFilesError, load_tokenizer
from tests.unit.gateway.model_files import BOS, EOS, write_model

_TURNS = [
    {"role": "system", "content": "Be  brief.\n"},
    {"role": "user", "content": "<b>\"Hé\" & 'you'</b>"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": ""},
]


def test_a_template_may_refuse() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(LemixError, match="roles must alternate") as raised:
        template.render(_TURNS, add_generation_prompt=True)
    assert (raised.value.code, raised.value.param) == (ErrorCode.INVALID_REQUEST, "messages")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ messages[9].content }}",
    ],
)
def test_a_template_cannot_reach_out(source: str) -> None:
    with pytest.raises(LemixError):
        ChatTemplate(source, {}).render(_TURNS, add_generation_prompt=True)


def test_a_broken_template_is_a_start_up_error(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ModelFilesError, match="chat template"):
        load_tokenizer(tmp_path)


def test_a_model_directory(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_model(tmp_path))
    assert (tokenizer.eos_token_ids, tokenizer.vocab_size, tokenizer.max_context_tokens) == ((EOS,), 262, 256)
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert tokenizer.decode([BOS, 0xC3, 0xA9, EOS]) == "é"
    chat = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert chat == [BOS, *b"[user]hi[assistant]"]
    assert load_tokenizer(tmp_path, max_context_tokens=64).max_context_tokens == 64


def test_template_and_end_tokens_in_other_places(tmp_path: Path) -> None:
    write_model(tmp_path, chat=False)
    named = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D{{ eos_token }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": named}))
    (tmp_path / "config.json").write_text(json.dumps({"n_positions": 32, "eos_token_id": [7, EOS]}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token_ids == (EOS, 7, 9)
    assert tokenizer.encode_chat([{"role": "user", "content": "hi"}]) == [ord("D"), EOS]
    assert tokenizer.max_context_tokens == 32


def test_without_a_template_chat_is_unsupported(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_model(tmp_path, chat=False))
    with pytest.raises(LemixError, match="no chat template") as raised:
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert raised.value.code is ErrorCode.UNSUPPORTED


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "config.json: No such file"),
        ("config.json", "{", "not JSON"),
        ("config.json", "[]", "not a JSON object"),
        ("config.json", "{}", "max_position_embeddings"),
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", "{}", "expected|missing|Error|error"),
    ],
)
def test_bad_model_directories_are_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    write_model(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelFilesError, match=message):
        load_tokenizer(tmp_path)
