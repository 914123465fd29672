"""Arrival processes, lengths and trace files."""

import itertools
import math
import statistics
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.simulator.arrivals import alternating, bursty, daily, poisson
from services.simulator.lengths import ORDERS, SHAPES, LogNormal, ordered
from services.simulator.trace_file import TraceError, TraceRow, read_trace


def _gaps(times: list[float]) -> list[float]:
    return [b - a for a, b in itertools.pairwise(times)]


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gaps_have_the_rate_and_spread_asked_for(cv: float) -> None:
    gaps = _gaps(list(itertools.islice(bursty(Random(1), 5.0, cv=cv), 40_000)))
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.1)


def test_poisson_is_reproducible_and_rises() -> None:
    one, two = (list(itertools.islice(poisson(Random(7), 3.0), 100)) for _ in range(2))
    assert one == two
    assert one == sorted(one)


def test_alternating_changes_its_rate_every_half_period() -> None:
    times = list(itertools.takewhile(lambda t: t < 1000.0, alternating(Random(2), 1.0, 9.0, period_s=20.0)))
    low = sum(t % 20.0 < 10.0 for t in times)
    assert low / 500.0 == pytest.approx(1.0, rel=0.15)
    assert (len(times) - low) / 500.0 == pytest.approx(9.0, rel=0.05)


def test_daily_swings_around_its_mean() -> None:
    times = list(itertools.takewhile(lambda t: t < 1000.0, daily(Random(3), 10.0, swing=0.8, day_s=1000.0)))
    assert len(times) / 1000.0 == pytest.approx(10.0, rel=0.05)
    assert sum(t < 500.0 for t in times) > 2 * sum(t >= 500.0 for t in times)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_rates_must_be_positive(bad: float) -> None:
    with pytest.raises(ValueError, match="rate"):
        next(poisson(Random(0), bad))


def test_a_lognormal_keeps_its_moments() -> None:
    lengths = LogNormal.of(250.0, 150.0, longest=100_000)
    draws = [lengths.draw(random) for random in [Random(4)] for _ in range(40_000)]
    assert statistics.fmean(draws) == pytest.approx(250.0, rel=0.03)
    assert statistics.pstdev(draws) == pytest.approx(150.0, rel=0.05)
    assert statistics.fmean(d * d for d in draws) == pytest.approx(lengths.mean_square, rel=0.08)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_shapes_stay_within_their_bounds(name: str) -> None:
    random = Random(5)
    for part in (SHAPES[name].prompt, SHAPES[name].output):
        assert all(part.shortest <= part.draw(random) <= part.longest for _ in range(2000))


@given(st.lists(st.integers(1, 4096), max_size=120), st.sampled_from(ORDERS), st.integers(0, 9))
def test_an_order_only_reorders(lengths: list[int], order: str, seed: int) -> None:
    assert sorted(ordered(lengths, order, Random(seed))) == sorted(lengths)


def test_an_unknown_order_is_named() -> None:
    with pytest.raises(ValueError, match=r"'zigzag'.*ascending"):
        ordered([1], "zigzag", Random(0))


def test_a_trace_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,2\n0.5,20,1\n")
    assert read_trace(path) == [TraceRow(0.0, 10, 2, line=2), TraceRow(0.5, 20, 1, line=3)]
    assert len(read_trace(path, limit=1)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arrival_s,prompt_tokens\n0,1\n", "line 1: column 'output_tokens' is missing"),
        ("arrival_s,prompt_tokens,output_tokens\n", "no rows"),
        ("arrival_s,prompt_tokens,output_tokens\n1,1,1\n0,1,1\n", "line 3: column 'arrival_s' goes back in time"),
        ("arrival_s,prompt_tokens,output_tokens\n-1,1,1\n", "line 2: column 'arrival_s' must be at least 0"),
        ("arrival_s,prompt_tokens,output_tokens\nnan,1,1\n", "line 2: column 'arrival_s' must be at least 0"),
        ("arrival_s,prompt_tokens,output_tokens\n0,x,1\n", "line 2: column 'prompt_tokens' is no number"),
        ("arrival_s,prompt_tokens,output_tokens\n0,1\n", "line 2: column 'output_tokens' is no number"),
        ("arrival_s,prompt_tokens,output_tokens\n0,1,0\n", "line 2: column 'output_tokens' must be at least 1"),
        ("arrival_s,prompt_tokens,output_tokens\n0,1.5,1\n", "line 2: column 'prompt_tokens' must be a whole number"),
    ],
)
def test_a_bad_trace_is_one_line_naming_the_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=message) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_trace_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"nowhere\.csv"):
        read_trace(tmp_path / "nowhere.csv")
