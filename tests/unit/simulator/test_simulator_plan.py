"""The searches, on questions whose answers are known."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.simulator.plan import Answer, Search, fewest, most


@given(threshold=st.integers(1, 200), highest=st.integers(1, 200))
def test_fewest_finds_the_threshold(threshold: int, highest: int) -> None:
    search = Search(lambda value: value >= threshold, max_probes=64)
    answer = fewest(search, highest)
    assert answer.finished
    assert answer.monotone
    if threshold > highest:
        assert answer == Answer(None, highest, monotone=True, finished=True)
    else:
        assert answer.value == threshold
        assert answer.next_worse == (threshold - 1 if threshold > 1 else None)
    assert len(search.probes) <= 2 * math.log2(highest) + 4


@given(good=st.sets(st.integers(1, 40)), highest=st.integers(1, 40), max_probes=st.integers(1, 12))
def test_fewest_never_claims_what_it_did_not_see(good: set[int], highest: int, max_probes: int) -> None:
    search = Search(lambda value: value in good, max_probes=max_probes)
    answer = fewest(search, highest)
    seen_good = {value for value in search.probes if value in good}
    seen_bad = set(search.probes) - seen_good
    assert len(search.probes) <= max_probes
    assert answer.value == min(seen_good, default=None)
    assert answer.monotone == (not seen_good or not seen_bad or max(seen_bad) < min(seen_good))
    if answer.finished and answer.monotone and answer.value is not None and answer.value > 1:
        assert search.probes[answer.value - 1] is False


def test_fewest_says_when_more_is_worse() -> None:
    answer = fewest(Search(lambda value: value in (4, 6, 7, 8)), 8)
    assert (answer.value, answer.monotone) == (4, False)  # 5 is looked at because it is next to 4


@given(threshold=st.floats(0.1, 1000.0), everything=st.floats(1.0, 1000.0), tolerance=st.floats(0.01, 0.3))
def test_most_is_within_its_tolerance(threshold: float, everything: float, tolerance: float) -> None:
    search = Search(lambda rate: min(rate, everything) <= threshold, max_probes=64)
    answer = most(search, lambda: everything, tolerance=tolerance)
    assert answer.finished
    assert answer.monotone
    if everything <= threshold:
        assert answer.value == math.inf
        return
    assert answer.value is not None
    assert answer.value <= threshold
    assert threshold - answer.value <= tolerance * everything * (1 + 1e-9)


def test_most_says_when_nothing_fits() -> None:
    search = Search(lambda rate: False)
    assert most(search, lambda: 10.0, tolerance=0.1) == Answer(None, 0.0, monotone=True, finished=True)
    assert list(search.probes) == [0.0, math.inf]


def test_most_tells_when_more_training_is_better_than_none() -> None:
    """Nodes that train are open to requests as well."""
    search = Search(lambda rate: rate > 0.0)
    answer = most(search, lambda: 10.0, tolerance=0.1)
    assert answer.value == math.inf
    assert not answer.monotone


def test_most_stops_where_next_to_nothing_fits() -> None:
    search = Search(lambda rate: rate == 0.0)
    answer = most(search, lambda: 100.0, tolerance=0.1)
    assert answer.value == 0.0
    assert answer.next_worse is not None
    assert answer.next_worse <= 10.0


def test_most_says_when_less_is_worse() -> None:
    # 50 passes, and 0.75 of what is found between it and 62.5 fails.
    answer = most(Search(lambda rate: rate == 0.0 or 50.0 <= rate <= 60.0), lambda: 100.0, tolerance=0.1)
    assert answer.value is not None
    assert 50.0 <= answer.value <= 60.0
    assert not answer.monotone


def test_a_search_stops_at_its_deadline() -> None:
    looks = []
    search = Search(lambda value: bool(looks.append(value)), out_of_time=lambda: len(looks) >= 2)
    answer = fewest(search, 64)
    assert looks == [1, 2]
    assert answer == Answer(None, 2, monotone=True, finished=False)


@pytest.mark.parametrize("tolerance", [0.0, 1.0, math.nan])
def test_a_tolerance_is_a_share(tolerance: float) -> None:
    with pytest.raises(ValueError, match="tolerance"):
        most(Search(lambda rate: True), lambda: 1.0, tolerance=tolerance)


def test_there_is_at_least_one_node() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        fewest(Search(lambda value: True), 0)
