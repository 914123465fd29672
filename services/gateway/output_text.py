"""The text of one generation: detokenised, cut at stop strings, counted."""

from collections.abc import Callable, Collection, Sequence

from services.gateway.detokenize import IncrementalDetokenizer
from services.gateway.stop_strings import StopFilter


class OutputText:
    """Assembles the output of one request. `stopped` tells that a stop string was met."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stops: Sequence[str], hidden_token_ids: Collection[int]
    ) -> None:
        """decode: text of tokens. hidden_token_ids: counted, never shown (end of sequence)."""
        self._detokenizer = IncrementalDetokenizer(decode)
        self._filter = StopFilter(stops)
        self._token_by_token = bool(stops)
        self._hidden = hidden_token_ids
        self.num_tokens = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met; later tokens are not wanted."""
        return self._filter.stopped

    def add(self, token_ids: Sequence[int]) -> tuple[str, list[int]]:
        """New text, and the tokens that count: those up to the one that completes a stop string."""
        if not self._token_by_token:
            self.num_tokens += len(token_ids)
            return self._show(token_ids), list(token_ids)
        text, used = "", []
        for token_id in token_ids:
            text += self._show([token_id])
            used.append(token_id)
            if self.stopped:
                break
        self.num_tokens += len(used)
        return text, used

    def finish(self) -> str:
        """Text that was held back, when the output ended without a stop string."""
        return self._filter.feed(self._detokenizer.flush()) + ("" if self.stopped else self._filter.flush())

    def _show(self, token_ids: Sequence[int]) -> str:
        return self._filter.feed(self._detokenizer.add([i for i in token_ids if i not in self._hidden]))
