"""Text from tokens: whole characters, stop strings, and the same text however tokens are cut."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from services.text.detokenize import IncrementalDetokenizer
from services.text.output_text import OutputText
from services.text.stop_strings import StopFilter
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


_STOPS = st.lists(st.text(alphabet="ab€", min_size=1, max_size=5), max_size=4)


def _cut_at_first_stop(text: str, stops: list[str], *, include_stop: bool) -> str | None:
    """The plain definition, on the whole text: the stop string that is complete first, of several the longest."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text.endswith(stop, 0, end)]
        if complete:
            return text[:end] if include_stop else text[: end - max(map(len, complete))]
    return None


@given(st.text(alphabet="ab€", max_size=40), _STOPS, st.lists(st.integers(0, 500), max_size=20), st.booleans())
def test_stop_filter_equals_cutting_the_whole_text(
    text: str, stops: list[str], cuts: list[int], include_stop: bool
) -> None:
    stop_filter = StopFilter(stops, include_stop=include_stop)
    shown = ""
    for chunk in _cut(list(range(len(text))), cuts):
        shown += stop_filter.feed("".join(text[i] for i in chunk))
    expected = _cut_at_first_stop(text, stops, include_stop=include_stop)
    assert stop_filter.stopped == (expected is not None)
    assert shown + stop_filter.flush() == (text if expected is None else expected)


def _split(text: str, rests: list[int]) -> list[int]:
    """Some tokens of the text: bytes, and merged ones where `rests` says so."""
    merged = _TOKENIZER.encode(text).ids
    tokens: list[int] = []
    for index, token in enumerate(merged):
        if rests and rests[index % len(rests)] % 2:
            tokens.extend(_decode([token]).encode() if token > EOS else [token])
        else:
            tokens.append(token)
    return tokens


@given(
    st.lists(st.sampled_from(["he", "llo", "w", " w", "€", "h", "l"]), max_size=30).map("".join),
    st.lists(st.sampled_from(["lo", "ell", "€", " w", "hello", "€h"]), min_size=1, max_size=4),
    st.lists(st.integers(0, 1), max_size=8),
    st.lists(st.integers(0, 500), max_size=20),
    st.booleans(),
)
def test_any_split_into_tokens_and_messages_gives_the_same_output(
    text: str, stops: list[str], rests: list[int], cuts: list[int], include_stop: bool
) -> None:
    expected = _cut_at_first_stop(text, stops, include_stop=include_stop)
    tokens = _split(text, rests)
    output = OutputText(_decode, stops, [EOS], include_stop=include_stop)
    pieces, used = [], []
    for chunk in _cut(tokens, cuts):
        if not output.stopped:
            piece, counted = output.add(chunk)
            pieces.append(piece)
            used.extend(counted)
            shown = "".join(pieces)
            assert (text if expected is None else expected).startswith(shown), "text that has to be taken back"
    assert output.stopped == (expected is not None)
    assert "".join(pieces) + output.finish() == (text if expected is None else expected)
    assert output.num_tokens == len(used)
    if output.stopped:  # the last token counted is the one that completes the stop string
        assert _cut_at_first_stop(_decode(used), stops, include_stop=True) is not None
        assert _cut_at_first_stop(_decode(used[:-1]), stops, include_stop=True) is None
    else:
        assert used == tokens


def test_a_stop_string_among_the_first_tokens_does_not_count() -> None:
    output = OutputText(_decode, ["ab"], [], min_tokens=3)
    assert output.add(list(b"abcab!")) == ("abc", list(b"abcab"))
    assert output.stopped
    output = OutputText(_decode, ["ab"], [], min_tokens=1)
    assert output.add(list(b"ab")) == ("ab", list(b"ab")), "it would begin before"
    assert not output.stopped


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
