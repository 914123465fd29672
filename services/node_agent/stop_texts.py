"""Stop strings on the node, so that a request ends with the token that completes one.

The gateway finds them in the same way; what it shows does not depend on the node. Without a vocabulary the node leaves
stop strings to the gateway, which cancels the request.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import structlog
from tokenizers import Tokenizer

from services.text import OutputText

_log = structlog.get_logger()


class StopTexts:
    """Follows the text of requests that have stop strings."""

    def __init__(self, model_path: Path, eos_token_ids: Collection[int]) -> None:
        """Reads tokenizer.json; a missing or broken one is logged."""
        self._eos_token_ids = frozenset(eos_token_ids)
        self._tokenizer: Tokenizer | None = None
        path = model_path / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more special
            _log.warning("stop strings are left to the gateway", path=str(path), error=str(error))

    def follow(self, stops: Sequence[str], min_tokens: int) -> OutputText | None:
        """The text of a new request; None: there is nothing to look for, or nothing to look with."""
        if not stops or self._tokenizer is None:
            return None
        return OutputText(self._decode, tuple(stops), self._eos_token_ids, min_tokens=min_tokens)

    def _decode(self, token_ids: Sequence[int]) -> str:
        assert self._tokenizer is not None
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text
