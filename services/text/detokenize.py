"""Text from tokens as they arrive, whole characters only."""

from collections.abc import Callable, Sequence

_REPLACEMENT = "�"
#: An unfinished UTF-8 character has at most three bytes, each shown as one replacement character.
_MAX_UNFINISHED = 3
#: Tokens after which a window is cut to its last ones: a bound on the work per token. What is kept is long enough for
#: the decoder to find the beginning of an unfinished character again, so none is torn in two.
_MAX_WINDOW = 64
#: Tokens from which on a window is begun anew with its newest ones: that costs one more decoding.
_LONG_WINDOW = 8
_KEPT_WINDOW = 16
_MAX_SLICE = 16


class IncrementalDetokenizer:
    """Turns a growing list of tokens into a growing text.

    Decoders look at neighbours (merged bytes, leading spaces), so the last tokens already shown are decoded again with
    the new ones and only what lies beyond is emitted. An unfinished character is held until its bytes are complete.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._shown = 0

    def add(self, token_ids: Sequence[int]) -> str:
        """Text that became certain with these tokens."""
        slices = range(0, len(token_ids), _MAX_SLICE)
        return "".join(self._add(token_ids[start : start + _MAX_SLICE]) for start in slices)

    def _add(self, token_ids: Sequence[int]) -> str:
        self._window.extend(token_ids)
        text = self._decode(self._window)
        stable = len(text) - _unfinished(text)
        emitted = text[self._shown : stable]
        self._shown = max(self._shown, stable)
        if emitted and len(self._window) >= _LONG_WINDOW:
            self._restart(token_ids)
        if len(self._window) > _MAX_WINDOW:
            self._window = self._window[-_KEPT_WINDOW:]
            text = self._decode(self._window)
            self._shown = len(text) - _unfinished(text)
        return emitted

    def flush(self) -> str:
        """The rest, replacement characters included, when no more tokens will come."""
        text = self._decode(self._window)[self._shown :] if self._window else ""
        self._window, self._shown = [], 0
        return text

    def _restart(self, newest: Sequence[int]) -> None:
        """Keep only the newest tokens as context."""
        text = self._decode(newest)
        if not text or text.startswith(_REPLACEMENT):
            return  # they cannot stand alone: a character began before them
        self._window, self._shown = list(newest), len(text) - _unfinished(text)


def _unfinished(text: str) -> int:
    """How many characters at the end may still change."""
    count = 0
    while count < _MAX_UNFINISHED and text.endswith(_REPLACEMENT, 0, len(text) - count):
        count += 1
    return count
