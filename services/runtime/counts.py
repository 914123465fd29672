"""Prometheus metrics that one thread counts, for what happens thousands of times a second.

A counter of prometheus_client takes a lock and checks itself each time (1.2 microseconds, a histogram 2.7). Here
counting is an addition; the thread that answers a scrape reads whatever is there, which may be one event behind.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate
from math import inf

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import REGISTRY, Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString


class Count:
    """A sum that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float = 1.0) -> None:
        """Count."""
        self.value += amount


class Counts(Collector):
    """A counter with labels. Look a child up once: `cache(counts.labels)` is what this class does itself."""

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str] = (), registry: CollectorRegistry = REGISTRY
    ) -> None:
        """name: without "_total", which the exporter adds."""
        self._name, self._documentation, self._label_names = name, documentation, tuple(labels)
        self._children: dict[tuple[str, ...], Count] = {}
        self.labels = cache(self._child)
        registry.register(self)

    def _child(self, *values: object) -> Count:
        if len(values) != len(self._label_names):
            raise ValueError(f"{self._name} has the labels {self._label_names}, not {len(values)}")
        return self._children.setdefault(tuple(map(str, values)), Count())

    def collect(self) -> Iterable[CounterMetricFamily]:
        """For the exporter."""
        family = CounterMetricFamily(self._name, self._documentation, labels=self._label_names)
        for values, count in list(self._children.items()):
            family.add_metric(values, count.value)
        yield family


class Distribution:
    """How many values lie between bounds, and their sum."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value; one that equals a bound lies below it."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


class Distributions(Collector):
    """A histogram with labels."""

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float],
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        """buckets: upper bounds, rising; infinity is added."""
        self._name, self._documentation, self._label_names = name, documentation, tuple(labels)
        self._bounds = tuple(buckets)
        self._children: dict[tuple[str, ...], Distribution] = {}
        self.labels = cache(self._child)
        registry.register(self)

    def _child(self, *values: object) -> Distribution:
        if len(values) != len(self._label_names):
            raise ValueError(f"{self._name} has the labels {self._label_names}, not {len(values)}")
        return self._children.setdefault(tuple(map(str, values)), Distribution(self._bounds))

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """For the exporter."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._label_names)
        names = [floatToGoString(bound) for bound in (*self._bounds, inf)]  # type: ignore[no-untyped-call]
        for values, child in list(self._children.items()):
            family.add_metric(values, list(zip(names, accumulate(child.counts), strict=True)), child.total)
        yield family
