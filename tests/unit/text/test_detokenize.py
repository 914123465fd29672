"""Text must not depend on how tokens were cut into messages."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from services.text.detokenize import IncrementalDetokenizer

#: Mostly bytes that begin or continue characters, so that runs without a whole character are common.
_BYTES = st.one_of(st.integers(0, 255), st.sampled_from([0xD6, 0x93, 0xE2, 0x80, 0xF0, 0x9F, 0xBF, 0x41]))


def _decode(token_ids: Sequence[int]) -> str:
    return bytes(token_ids).decode("utf-8", "replace")


def _in_pieces(token_ids: Sequence[int], sizes: Sequence[int]) -> str:
    detokenizer = IncrementalDetokenizer(_decode)
    text, start = "", 0
    for size in sizes:
        text += detokenizer.add(token_ids[start : start + size])
        start += size
    return text + detokenizer.add(token_ids[start:]) + detokenizer.flush()


@given(st.lists(_BYTES, max_size=300), st.lists(st.integers(1, 40), max_size=60))
def test_any_cut_gives_the_whole_text(token_ids: list[int], sizes: list[int]) -> None:
    assert _in_pieces(token_ids, sizes) == _decode(token_ids)


def test_a_character_behind_many_broken_ones_is_not_torn() -> None:
    token_ids = [0x93] * 64 + [0xD6, 0x93]
    assert _in_pieces(token_ids, [1] * len(token_ids)) == "\ufffd" * 64 + "\u0593"
