"""Metrics without locks look to a scraper like those of prometheus_client."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from services.runtime.counts import Counts, Distributions


def _samples(registry: CollectorRegistry) -> list[str]:
    lines = generate_latest(registry).decode().splitlines()
    return sorted(line for line in lines if "_created" not in line)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0.0, 1e6)), max_size=20))
def test_counts_are_exported_like_a_counter(added: list[tuple[str, float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    counts = Counts("seen", "What was seen", ["kind"], ours)
    counter = Counter("seen", "What was seen", ["kind"], registry=theirs)
    for kind, amount in added:
        counts.labels(kind).add(amount)
        counter.labels(kind).inc(amount)
    assert _samples(ours) == _samples(theirs)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0]), max_size=20))
def test_distributions_are_exported_like_a_histogram(values: list[float]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    ours_s = Distributions("time_seconds", "Time", ["stage"], buckets=(1.0, 2.0), registry=ours)
    theirs_s = Histogram("time_seconds", "Time", ["stage"], buckets=(1.0, 2.0), registry=theirs)
    for value in values:
        ours_s.labels(3).observe(value)
        theirs_s.labels(3).observe(value)
    assert _samples(ours) == _samples(theirs)


def test_a_child_is_the_same_every_time() -> None:
    counts = Counts("seen", "What was seen", ["kind"], CollectorRegistry())
    assert counts.labels("a") is counts.labels("a")
    assert counts.labels("a") is not counts.labels("b")


def test_missing_labels_are_refused() -> None:
    registry = CollectorRegistry()
    with pytest.raises(ValueError, match="seen has the labels"):
        Counts("seen", "What was seen", ["kind"], registry).labels()
    with pytest.raises(ValueError, match="time has the labels"):
        Distributions("time", "Time", buckets=(1.0,), registry=registry).labels("a")
