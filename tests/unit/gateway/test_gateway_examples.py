"""Training examples from JSON, and the checks shared by both front doors."""

import json
from pathlib import Path
from typing import Any

import pytest

from lemix.errors import ErrorCode, LemixError
from lemix.v1 import types_pb2
from services.gateway.tokenizer import load_tokenizer
from services.gateway.training_examples import ExampleBuilder, parse_file
from services.gateway.types import Turn
from services.gateway.validation import check_hyperparameters, check_id
from tests.unit.gateway.model_files import BOS, EOS, write_model


@pytest.fixture
def builder(tmp_path: Path) -> ExampleBuilder:
    return ExampleBuilder(load_tokenizer(write_model(tmp_path, context=64)))


def test_text_ends_with_the_end_token(builder: ExampleBuilder) -> None:
    example = builder.from_text("ab")
    assert (list(example.token_ids), example.num_context_tokens) == ([97, 98, EOS], 0)


def test_a_conversation_teaches_its_last_turn(builder: ExampleBuilder) -> None:
    turns = [Turn("user", "q"), Turn("assistant", "a"), Turn("user", "r"), Turn("assistant", "b")]
    example = builder.from_messages(turns)
    context = [BOS, *b"[user]q[assistant]a", EOS, *b"[user]r[assistant]"]
    assert list(example.token_ids) == [*context, ord("b"), EOS]
    assert example.num_context_tokens == len(context)


def test_a_template_without_an_end_token_gets_one(tmp_path: Path) -> None:
    write_model(tmp_path, context=64)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}|{{ m.content }}{% endfor %}")
    builder = ExampleBuilder(load_tokenizer(tmp_path))
    example = builder.from_messages([Turn("user", "q"), Turn("assistant", "a")])
    assert (list(example.token_ids), example.num_context_tokens) == ([*b"|q|a", EOS], 2)


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda b: b.from_text(""), ErrorCode.INVALID_REQUEST),
        (lambda b: b.from_text("x" * 64), ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        (lambda b: b.from_text("x" * 100_000), ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        (lambda b: b.from_pair("x" * 60, "yyyy"), ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        (lambda b: b.from_pair("x", ""), ErrorCode.INVALID_REQUEST),
        (lambda b: b.from_messages([]), ErrorCode.INVALID_REQUEST),
        (lambda b: b.from_messages([Turn("user", "q")]), ErrorCode.INVALID_REQUEST),
        (lambda b: b.from_messages([Turn("user", "q"), Turn("assistant", "")]), ErrorCode.INVALID_REQUEST),
        (lambda b: b.from_messages([Turn("boss", "q"), Turn("assistant", "a")]), ErrorCode.INVALID_REQUEST),
    ],
)
def test_bad_examples(builder: ExampleBuilder, call: Any, code: ErrorCode) -> None:
    with pytest.raises(LemixError) as raised:
        call(builder)
    assert raised.value.code is code


def test_the_longest_example_fits_exactly(builder: ExampleBuilder) -> None:
    assert len(builder.from_text("x" * 63).token_ids) == 64


def test_a_file_may_have_a_mark_blank_lines_and_windows_ends(builder: ExampleBuilder) -> None:
    content = b'\xef\xbb\xbf{"text": "a\xc2\x85\xe2\x80\xa8b"}\r\n\r\n{"text": "c"}'
    assert len(parse_file(content, builder, 10).examples) == 2


def test_too_many_examples_name_the_line(builder: ExampleBuilder) -> None:
    with pytest.raises(LemixError, match=r"line 3: more than 2 examples"):
        parse_file(b'{"text": "a"}\n' * 5, builder, 2)


_BAD = b'{"text": "a"}\n{"text": 5}\n\xff\n{"txt": "b"}\n[\n\n{"prompt": "p", "completion": ""}\n{"text": "c"}\n'


def test_bad_lines_are_skipped_and_counted_if_asked_for(builder: ExampleBuilder) -> None:
    parsed = parse_file(_BAD, builder, 10, skip_bad=True)
    assert [bytes(example.token_ids[:1]) for example in parsed.examples] == [b"a", b"c"]
    assert (parsed.num_skipped, parsed.num_truncated) == (5, 0)
    with pytest.raises(LemixError, match="line 2: "):
        parse_file(_BAD, builder, 10)
    with pytest.raises(LemixError, match="no examples; line 1: not JSON"):
        parse_file(b"{\n[", builder, 10, skip_bad=True)
    with pytest.raises(LemixError, match="more than 1 examples"):
        parse_file(_BAD, builder, 1, skip_bad=True)


@pytest.mark.parametrize(
    ("value", "num_context"),
    [
        ({"text": "x" * 64}, 0),
        ({"text": "x" * 100_000}, 0),
        ({"prompt": "p" * 10, "completion": "c" * 80}, 10),
        ({"prompt": "p" * 63, "completion": "c" * 100_000}, 63),
    ],
)
def test_long_examples_are_cut_to_their_first_tokens(
    builder: ExampleBuilder, value: dict[str, str], num_context: int
) -> None:
    content = json.dumps(value).encode() + b'\n{"text": "short"}'
    parsed = parse_file(content, builder, 10, truncate=True)
    first, second = parsed.examples
    assert bytes(first.token_ids) == "".join(value.values())[:64].encode()
    assert first.num_context_tokens == num_context
    assert len(second.token_ids) == 6
    assert (parsed.num_skipped, parsed.num_truncated) == (0, 1)
    with pytest.raises(LemixError, match="line 1: "):
        parse_file(content, builder, 10)


def test_a_context_that_leaves_nothing_to_learn_is_a_bad_line(builder: ExampleBuilder) -> None:
    content = json.dumps({"prompt": "p" * 64, "completion": "c"}).encode()
    with pytest.raises(LemixError, match="no token to learn"):
        parse_file(content, builder, 10, truncate=True)


@pytest.mark.parametrize("value", ["a b", "x" * 129, "ü", "a/b", "a\n"])
def test_ids_are_plain(value: str) -> None:
    with pytest.raises(LemixError):
        check_id(value, "request_id")
    check_id("A-z_0.9:" + "x" * 120, "request_id")


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": 0.0}, {"learning_rate": float("nan")}, {"learning_rate": float("inf")}, {"num_epochs": 0},
        {"num_epochs": 1001}, {"batch_size": 257}, {"gradient_accumulation_steps": 0}, {"weight_decay": -0.1},
        {"max_grad_norm": 0.0}, {"lr_schedule": "step"}, {"lr_schedule": ""},
        {"max_skipped_in_row": 0}, {"max_skipped_in_row": 1001},
    ],
)  # fmt: skip
def test_hyperparameters_out_of_range_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(LemixError) as raised:
        check_hyperparameters(types_pb2.Hyperparameters(**values))
    assert raised.value.param == f"hyperparameters.{next(iter(values))}"


def test_absent_and_bordering_hyperparameters_are_fine() -> None:
    check_hyperparameters(types_pb2.Hyperparameters())
    check_hyperparameters(types_pb2.Hyperparameters(warmup_steps=0, weight_decay=0.0, num_epochs=1000, batch_size=256))
