"""Rate of something over the recent past, of constant size."""

import math


class Recent:
    """Exponentially weighted rate: what happened `window_s` ago counts 1/e. Younger than that, it is a plain mean."""

    __slots__ = ("_at_s", "_since_s", "_sum", "_window_s")

    def __init__(self, since_s: float, window_s: float) -> None:
        self._since_s = self._at_s = since_s
        self._window_s = window_s
        self._sum = 0.0

    def add(self, at_s: float, amount: float) -> None:
        """`amount` happened at `at_s`; reports may come late."""
        age_s = self._at_s - at_s
        if age_s >= 0.0:
            self._sum += amount * math.exp(-age_s / self._window_s)
        else:
            self._sum = self._sum * math.exp(age_s / self._window_s) + amount
            self._at_s = at_s

    def per_s(self, now_s: float) -> float:
        """Amount per second, as of `now_s`."""
        age_s = now_s - self._since_s
        if age_s <= 0.0:
            return 0.0
        decayed = self._sum * math.exp(min(0.0, self._at_s - now_s) / self._window_s)
        return decayed / (self._window_s * -math.expm1(-age_s / self._window_s))
