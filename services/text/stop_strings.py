"""Finding stop strings in text that arrives in pieces."""

from collections.abc import Sequence


class StopFilter:
    """Passes text on up to the stop string that is complete first, holding back what may be the start of one.

    Of several that are complete at the same character the longest counts. So the result does not depend on how the
    text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        """stops: non-empty strings; none at all passes everything through. include_stop: the stop string is shown."""
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Text that is certain to be shown. Empty once `stopped`."""
        if not self._stops:
            return text
        if self.stopped:
            return ""
        self._held += text
        found = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            end, start = min(found)
            text, self._held = self._held[: end if self._include_stop else start], ""
            return text
        keep = self._possible_start()
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def flush(self) -> str:
        """What was held back, when no more text will come."""
        text, self._held = self._held, ""
        return text

    def _possible_start(self) -> int:
        """Length of the longest end of the held text that a stop string starts with."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0
