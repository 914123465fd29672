"""Text from tokens: whole characters, stop strings, and the same text however tokens are cut."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.detokenize import IncrementalDetokenizer
from services.gateway.output_text import OutputText
from services.gateway.stop_strings import StopFilter
from tests.unit.gateway.model_files import EOS, byte_tokenizer

_TOKENIZER = byte_tokenizer()


def _decode(tokens: object) -> str:
    text: str = _TOKENIZER.decode(list(tokens), skip_special_tokens=True)  # type: ignore[call-overload]
    return text


def _cut(items: list[int], cuts: list[int]) -> list[list[int]]:
    borders = sorted({0, len(items), *(cut % (len(items) + 1) for cut in cuts)})
    return [items[a:b] for a, b in pairwise(borders)]


@given(st.text(max_size=60), st.lists(st.integers(0, 500), max_size=30))
def test_pieces_join_to_the_text(text: str, cuts: list[int]) -> None:
    detokenizer = IncrementalDetokenizer(_decode)
    pieces = [detokenizer.add(chunk) for chunk in _cut(_TOKENIZER.encode(text).ids, cuts)]
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == text


@given(st.lists(st.integers(0, 261), max_size=60), st.lists(st.integers(0, 500), max_size=60))
def test_any_tokens_join_to_what_they_decode_to(tokens: list[int], cuts: list[int]) -> None:
    detokenizer = IncrementalDetokenizer(_decode)
    pieces = [detokenizer.add(chunk) for chunk in _cut(tokens, cuts)]
    assert "".join(pieces) + detokenizer.flush() == _decode(tokens)


def test_a_character_is_shown_when_its_last_byte_comes() -> None:
    detokenizer = IncrementalDetokenizer(_decode)
    assert [detokenizer.add([byte]) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]


def test_garbage_without_end_is_shown_in_bounded_time() -> None:
    seen: list[int] = []

    def decode(tokens: object) -> str:
        seen.append(len(tokens))  # type: ignore[arg-type]
        return _decode(tokens)

    detokenizer = IncrementalDetokenizer(decode)
    shown = sum(len(detokenizer.add([0x80])) for _ in range(1000))
    assert shown >= 900
    assert max(seen) <= 80


def test_leading_spaces_survive_decoders_that_strip_them() -> None:
    words = {1: "▁the", 2: "▁cat", 3: "s"}

    def decode(tokens: object) -> str:
        return "".join(words[token] for token in tokens).replace("▁", " ").removeprefix(" ")  # type: ignore[attr-defined]

    detokenizer = IncrementalDetokenizer(decode)
    assert [detokenizer.add([token]) for token in (1, 2, 3, 2)] == ["the", " cat", "s", " cat"]


@given(
    st.text(alphabet="ab", max_size=40),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4),
    st.lists(st.integers(0, 500), max_size=20),
)
def test_stop_filter_equals_cutting_the_whole_text(text: str, stops: list[str], cuts: list[int]) -> None:
    stop_filter = StopFilter(stops)
    shown = ""
    for chunk in _cut(list(range(len(text))), cuts):
        shown += stop_filter.feed("".join(text[i] for i in chunk))
    if not stop_filter.stopped:
        shown += stop_filter.flush()
    assert stop_filter.stopped == any(stop in text for stop in stops)
    if not stop_filter.stopped:
        assert shown == text
    else:  # cut at the stop string that was complete first
        ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
        assert any(text[len(shown) :].startswith(stop) for stop in stops)
        assert len(shown) < max(ends)


def test_only_what_may_start_a_stop_string_is_held_back() -> None:
    stop_filter = StopFilter(["END"])
    assert [stop_filter.feed(piece) for piece in ("a", "bE", "N", "x", "EN", "D tail")] == ["a", "b", "", "ENx", "", ""]
    assert stop_filter.stopped
    assert stop_filter.feed("more") == ""


def test_tokens_are_counted_up_to_the_stop_string() -> None:
    output = OutputText(_decode, ["lo"], [EOS])
    tokens = _TOKENIZER.encode("he").ids + list(b"xlo!!")
    assert output.add(tokens) == ("hex", tokens[:-2])
    assert output.stopped
    assert output.num_tokens == len(tokens) - 2
    assert output.finish() == ""


def test_the_end_token_counts_and_does_not_show() -> None:
    output = OutputText(_decode, [], [EOS])
    assert output.add([*b"hi", EOS]) == ("hi", [*b"hi", EOS])
    assert (output.finish(), output.num_tokens, output.stopped) == ("", 3, False)


def test_held_back_text_comes_at_the_end() -> None:
    output = OutputText(_decode, ["END"], [])
    assert output.add(list(b"xEN"))[0] == "x"
    assert output.finish() == "EN"
    output = OutputText(_decode, [], [])
    assert output.add([ord("a"), 0xE2])[0] == "a"
    assert output.finish() == "�"
