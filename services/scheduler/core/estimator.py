"""Running statistics: output lengths, lengths sent to a node, arrivals. All of constant size."""

import math
from collections import deque

from services.scheduler.core.tasks import InferenceTask


class _RecentMean:
    """Mean of the last values; configured until there are enough."""

    __slots__ = ("_initial", "_recent", "_sum")

    def __init__(self, initial: float) -> None:
        self._initial = initial
        self._recent: deque[int] = deque()
        self._sum = 0

    def observe(self, value: int) -> None:
        self._recent.append(value)
        self._sum += value
        if len(self._recent) > OutputLengths.WINDOW:
            self._sum -= self._recent.popleft()

    @property
    def value(self) -> float:
        count = len(self._recent)
        return self._sum / count if count >= OutputLengths.ENOUGH else self._initial


class OutputLengths:
    """Expected output length of a request: its own where that is fixed, else the mean of the last that were not."""

    __slots__ = ("_all", "_open")

    #: Ended requests remembered, and how many it takes before they replace the configured start value.
    WINDOW = 256
    ENOUGH = 8

    def __init__(self, initial_tokens: int) -> None:
        self._open = _RecentMean(float(initial_tokens))
        self._all = _RecentMean(float(initial_tokens))

    def observe(self, task: InferenceTask, output_tokens: int) -> None:
        """A request ended by itself after `output_tokens`."""
        self._all.observe(output_tokens)
        if not task.fixed_output:
            self._open.observe(output_tokens)

    def expected_tokens(self, task: InferenceTask) -> float:
        """Expected output of a request."""
        most = float(task.max_tokens)
        return most if task.fixed_output else min(self._open.value, most)

    @property
    def mean_tokens(self) -> float:
        """Expected output of whatever request comes next."""
        return self._all.value


class RunningMoments:
    """Mean and standard deviation of a stream (Welford)."""

    __slots__ = ("_m2", "count", "mean")

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._m2 = 0.0

    def observe(self, value: float) -> None:
        """Take one value in."""
        self.count += 1
        delta = value - self.mean
        self.mean += delta / self.count
        self._m2 += delta * (value - self.mean)

    @property
    def std(self) -> float:
        """Sample standard deviation; 0 with fewer than two values."""
        return math.sqrt(self._m2 / (self.count - 1)) if self.count > 1 else 0.0

    def consistency(self, value: float) -> float:
        """LC: exp(-z^2 / 2) of `value`, dimensionless, in 0-1; 0 while the spread is unknown."""
        if self.count < 2 or self._m2 <= 0.0:
            return 0.0
        deviation = value - self.mean
        return math.exp(-0.5 * deviation * deviation * (self.count - 1) / self._m2)


class Arrivals:
    """Recent rate of arriving requests: an exponential average of the gaps between them."""

    __slots__ = ("_gap_s", "last_s")

    _GAIN = 0.1

    def __init__(self) -> None:
        self.last_s: float | None = None
        self._gap_s: float | None = None

    def observe(self, now_s: float) -> None:
        """A request arrived."""
        if self.last_s is not None:
            gap_s = now_s - self.last_s
            self._gap_s = gap_s if self._gap_s is None else self._gap_s + self._GAIN * (gap_s - self._gap_s)
        self.last_s = now_s

    def gap_s(self, now_s: float) -> float:
        """Expected time between arrivals, seconds; grows while none comes; infinite before the second one."""
        if self._gap_s is None or self.last_s is None:
            return math.inf
        return max(self._gap_s, now_s - self.last_s)
