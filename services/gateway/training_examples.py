"""Training examples from what people write: JSON objects in, tokens and a masked context out."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import work_pb2
from services.gateway.prompts import MAX_CHARS_PER_TOKEN, check_turns
from services.gateway.tokenizer import ModelTokenizer
from services.gateway.types import Turn
from services.gateway.validation import invalid

_FORMS = ({"text"}, {"prompt", "completion"}, {"messages"})


class ExampleBuilder:
    """Tokenises examples for one model.

    text: every token is a label. prompt + completion: the completion's tokens are. messages: the last assistant turn's
    tokens are, everything before it is context (a context is a leading run of tokens, so earlier assistant turns cannot
    be labels without making the user's turns labels too). A completion ends with the end-of-sequence token.
    """

    def __init__(self, tokenizer: ModelTokenizer, *, truncate: bool = False) -> None:
        """truncate: an example longer than the context is cut to its first tokens and counted, not refused."""
        self._tokenizer = tokenizer
        self._truncate = truncate
        self.num_truncated = 0

    def truncating(self) -> "ExampleBuilder":
        """Another one that cuts, with a count of its own."""
        return ExampleBuilder(self._tokenizer, truncate=True)

    def from_text(self, text: str) -> work_pb2.TrainingExample:
        """Raises INVALID_REQUEST when empty, CONTEXT_LENGTH_EXCEEDED when too long."""
        if not text:
            raise invalid("text is empty", "text")
        text = self._fitting(text)
        return self._example([*self._tokenizer.encode(text), *self._end()], 0)

    def from_pair(self, prompt: str, completion: str) -> work_pb2.TrainingExample:
        """A context and what should follow it. Errors as `from_text`."""
        if not completion:
            raise invalid("completion is empty", "completion")
        completion = self._fitting(completion, behind=prompt)
        context = self._tokenizer.encode(prompt) if prompt else []
        answer = self._tokenizer.encode(completion, add_special_tokens=not prompt)
        return self._example([*context, *answer, *self._end()], len(context))

    def from_messages(self, turns: Sequence[Turn]) -> work_pb2.TrainingExample:
        """A conversation. Raises INVALID_REQUEST, UNSUPPORTED (no chat template), CONTEXT_LENGTH_EXCEEDED."""
        check_turns(turns)
        if not turns or turns[-1].role != "assistant" or not turns[-1].content:
            raise invalid("the last message must be a non-empty assistant message", "messages")
        self._check_characters(*(turn.content for turn in turns))
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        whole = self._tokenizer.encode_chat(messages, add_generation_prompt=False)
        context = self._tokenizer.encode_chat(messages[:-1]) if len(messages) > 1 else []
        if not any(token in self._tokenizer.eos_token_ids for token in whole[len(context) :]):
            whole = [*whole, *self._end()]
        return self._example(whole, _common_prefix(context, whole))

    def from_object(self, value: object) -> work_pb2.TrainingExample:
        """One JSON value of a training file. Errors as the others; INVALID_REQUEST for an unknown form."""
        if not isinstance(value, dict):
            raise invalid("not a JSON object")
        if set(value) not in _FORMS:
            raise invalid('needs either "text", or "prompt" and "completion", or "messages", and nothing else')
        if "messages" in value:
            return self.from_messages(_turns(value["messages"]))
        for name, content in value.items():
            _check_text(name, content)
        return (
            self.from_text(value["text"]) if "text" in value else self.from_pair(value["prompt"], value["completion"])
        )

    def _fitting(self, text: str, behind: str = "") -> str:
        """The text, or as much of it as may fit. Refused without `truncate`, or when what stands before is too long."""
        if self._truncate:
            self._check_characters(behind)
            text = text[: self._tokenizer.max_context_tokens * MAX_CHARS_PER_TOKEN - len(behind)]
        self._check_characters(behind, text)
        return text

    def _check_characters(self, *texts: str) -> None:
        """Refuse what cannot fit before tokenising it."""
        limit = self._tokenizer.max_context_tokens
        num_chars = sum(map(len, texts))
        if num_chars > limit * MAX_CHARS_PER_TOKEN:
            raise LemixError(
                ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                f"{num_chars} characters do not fit the model's context of {limit} tokens",
            )

    def _end(self) -> Sequence[int]:
        return self._tokenizer.eos_token_ids[:1]

    def _example(self, tokens: Sequence[int], num_context: int) -> work_pb2.TrainingExample:
        limit = self._tokenizer.max_context_tokens
        is_long = len(tokens) > limit
        if is_long and not self._truncate:
            raise LemixError(
                ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                f"the example has {len(tokens)} tokens; the model's context is {limit}",
            )
        tokens = tokens[:limit]
        if len(tokens) <= max(1, num_context):
            raise invalid("the example has no token to learn: it needs at least two tokens")
        self.num_truncated += is_long
        return work_pb2.TrainingExample(token_ids=tokens, num_context_tokens=num_context)


@dataclass(frozen=True, slots=True)
class ParsedFile:
    """Examples of a training file. num_skipped: lines that could not be used. num_truncated: examples that were cut."""

    examples: list[work_pb2.TrainingExample]
    num_skipped: int
    num_truncated: int


def parse_file(
    content: bytes, builder: ExampleBuilder, max_examples: int, *, skip_bad: bool = False, truncate: bool = False
) -> ParsedFile:
    """Every example of a JSONL file; blank lines are nothing.

    skip_bad: leave out lines that cannot be used. truncate: cut examples that are too long. Raises
    INVALID_TRAINING_FILE naming the first line that cannot be used, or when no line can.
    """
    builder = builder.truncating() if truncate else builder
    examples: list[work_pb2.TrainingExample] = []
    first_bad: LemixError | None = None
    num_skipped = 0
    for number, line in _lines(content):
        try:
            examples.append(_example_of(number, line, builder))
        except LemixError as error:
            if not skip_bad:
                raise
            first_bad = first_bad or error
            num_skipped += 1
        if len(examples) > max_examples:
            raise _bad_line(number, f"more than {max_examples} examples")
    if not examples:
        reason = f"; {first_bad.message}" if first_bad is not None else ""
        raise LemixError(ErrorCode.INVALID_TRAINING_FILE, f"the file has no examples{reason}", param="file")
    return ParsedFile(examples, num_skipped, builder.num_truncated if truncate else 0)


def _example_of(number: int, line: bytes, builder: ExampleBuilder) -> work_pb2.TrainingExample:
    """Raises INVALID_TRAINING_FILE naming the line."""
    try:
        return builder.from_object(json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        raise _bad_line(number, "not UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise _bad_line(number, "not JSON") from error
    except LemixError as error:
        raise _bad_line(number, error.message) from error


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, line


def _bad_line(number: int, reason: str) -> LemixError:
    return LemixError(ErrorCode.INVALID_TRAINING_FILE, f"line {number}: {reason}", param="file")


def _turns(value: Any) -> list[Turn]:
    if not isinstance(value, list) or not value:
        raise invalid("messages must be a non-empty list", "messages")
    turns = []
    for index, entry in enumerate(value):
        if not isinstance(entry, dict) or not {"role", "content"} <= set(entry) <= {"role", "content", "weight"}:
            raise invalid(f"message {index} must have role and content only", f"messages.{index}")
        if entry.get("weight", 1) != 1:
            raise invalid("message weights are not supported", f"messages.{index}.weight")
        for name in ("role", "content"):
            _check_text(f"{name} of message {index}", entry[name])
        turns.append(Turn(entry["role"], entry["content"]))
    return turns


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise invalid(f"{name} must be a string", name)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # an escape like "\\ud800" alone
        raise invalid(f"{name} holds half of a surrogate pair", name) from error


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Leading tokens both share: with merges across the border the context is what is certain."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count
