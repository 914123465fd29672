"""How late the ends of emulated operations are noticed: the error of an emulation in real time."""

from bisect import bisect_left

from services.node_agent import metrics
from services.node_agent.engine.base import ClockSlip

#: Upper bounds of the buckets, as a share of the operation's own time; each is an eighth more than the one before.
_SMALLEST, _GROWTH, _BUCKETS = 1e-5, 1.125, 120
_BOUNDS = tuple(_SMALLEST * _GROWTH**index for index in range(_BUCKETS))


class SlipCounter:
    """Counts the clock slip of a node's stages."""

    def __init__(self) -> None:
        self._counts = [0] * (_BUCKETS + 1)
        self._ops = 0
        self._late_s = self._busy_s = self._worst_s = 0.0

    def observe(self, late_s: float, duration_s: float) -> None:
        """An operation of `duration_s` was noticed to have ended `late_s` after its end."""
        share = late_s / duration_s
        self._counts[bisect_left(_BOUNDS, share)] += 1
        self._ops += 1
        self._late_s += late_s
        self._busy_s += duration_s
        self._worst_s = max(self._worst_s, late_s)
        metrics.CLOCK_SLIP.observe(share)

    def figures(self) -> ClockSlip:
        """What was counted so far."""
        p50, p99 = self._quantile(0.5), self._quantile(0.99)
        return ClockSlip(self._ops, p50, p99, self._worst_s, self._late_s, self._busy_s)

    def _quantile(self, share: float) -> float:
        if not self._ops:
            return 0.0
        wanted = share * self._ops
        seen = 0
        for bound, count in zip(_BOUNDS, self._counts, strict=False):
            seen += count
            if seen >= wanted:
                return bound
        return _BOUNDS[-1]
