"""The text of one generation: detokenised, cut at stop strings, counted."""

from collections.abc import Callable, Collection, Sequence

from services.text.detokenize import IncrementalDetokenizer
from services.text.stop_strings import StopFilter


class OutputText:
    """Assembles the output of one request. `stopped` tells that a stop string was met."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stops: Sequence[str],
        hidden_token_ids: Collection[int],
        *,
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        """decode: text of tokens. hidden_token_ids: counted, never shown (end of sequence).

        min_tokens: what is certain of the text when so many tokens are there is not searched for stop strings.
        include_stop: the stop string belongs to the output.
        """
        self._detokenizer = IncrementalDetokenizer(decode)
        self._filter = StopFilter(stops, include_stop=include_stop)
        self._token_by_token = bool(stops)
        self._hidden = hidden_token_ids
        self._min_tokens = min_tokens
        self.num_tokens = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met; later tokens are not wanted."""
        return self._filter.stopped

    def add(self, token_ids: Sequence[int]) -> tuple[str, list[int]]:
        """New text, and the tokens that count: those up to the one that completes a stop string."""
        if not self._token_by_token:
            self.num_tokens += len(token_ids)
            return self._decode(token_ids), list(token_ids)
        text, used = "", []
        for token_id in token_ids:
            self.num_tokens += 1
            new = self._decode([token_id])
            text += new if self.num_tokens <= self._min_tokens else self._filter.feed(new)
            used.append(token_id)
            if self.stopped:
                break
        return text, used

    def finish(self) -> str:
        """Text that was held back, when the output ended without a stop string."""
        rest = self._detokenizer.flush()
        if self.num_tokens > self._min_tokens:
            rest = self._filter.feed(rest)
        return rest + self._filter.flush()

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._detokenizer.add([i for i in token_ids if i not in self._hidden])
