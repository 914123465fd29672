"""When the newest optimizer step contained in each weights version was made, and for which job."""

from typing import NamedTuple

_MAX_VERSIONS = 256


class _Version(NamedTuple):
    trained_unix_s: float | None = None
    job_id: str = ""


class WeightAges:
    """Unix time of the newest optimizer step by weights step; None: never trained.

    Ops of older versions may still be running when a newer one exists, so recent versions are kept.
    """

    def __init__(self) -> None:
        self._versions: dict[int, _Version] = {0: _Version()}
        self._newest = 0

    @property
    def newest_step(self) -> int:
        """The newest weights step on all stages."""
        return self._newest

    def record(self, step: int, trained_unix_s: float | None, job_id: str = "") -> None:
        """A version is complete on the last stage. Versions come in order. job_id: whose optimizer step made it;
        empty: nobody's, the version before tells."""
        self._versions[step] = _Version(trained_unix_s, job_id or self.job_of(self._newest))
        self._newest = step
        while len(self._versions) > _MAX_VERSIONS:
            del self._versions[next(iter(self._versions))]

    def at(self, step: int) -> float | None:
        """Unix time for this version, seconds; None: never trained, or older than what is kept."""
        return self._versions.get(step, _Version()).trained_unix_s

    def job_of(self, step: int) -> str:
        """Job of the newest step this node made in this version; empty: none, or older than what is kept."""
        return self._versions.get(step, _Version()).job_id
