"""When the newest optimizer step contained in each weights version was made."""

_MAX_VERSIONS = 256


class WeightAges:
    """Unix time of the newest optimizer step by weights step; None: never trained.

    Ops of older versions may still be running when a newer one exists, so recent versions are kept.
    """

    def __init__(self) -> None:
        self._trained_unix_s: dict[int, float | None] = {0: None}
        self._newest = 0

    @property
    def newest_step(self) -> int:
        """The newest weights step on all stages."""
        return self._newest

    def record(self, step: int, trained_unix_s: float | None) -> None:
        """A version is complete on the last stage. Versions come in order."""
        self._trained_unix_s[step] = trained_unix_s
        self._newest = step
        while len(self._trained_unix_s) > _MAX_VERSIONS:
            del self._trained_unix_s[next(iter(self._trained_unix_s))]

    def at(self, step: int) -> float | None:
        """Unix time for this version, seconds; None: never trained, or older than what is kept."""
        return self._trained_unix_s.get(step)
