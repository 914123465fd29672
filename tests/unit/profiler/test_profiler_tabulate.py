"""Tables: when they are chosen, how their holes are filled, how they are judged."""

import pytest

from services.latency import LatencyModel, OpKind
from services.profiler.fit import Timing, fit_op
from services.profiler.tabulate import between, tabulate

LENGTHS = (16, 32, 64, 96, 128, 192, 256)
SMOOTH = LatencyModel("affine", (1.0, 0.01))


def kinked_s(batch, length):
    return max(2e-3, 2e-5 * batch * length)


def points(truth, grid):
    return [Timing(batch, length, (truth(batch, length),) * 3) for batch, length in grid]


def test_a_table_is_chosen_where_no_polynomial_follows():
    grid = [(batch, length) for batch in (1, 2, 4, 8) for length in LENGTHS]
    fits = fit_op(0, OpKind.PREFILL, points(kinked_s, grid))
    (best,) = [fit for fit in fits if fit.chosen]
    assert best.form == "tabulated"
    assert best.model.predict_s(2, 24) == pytest.approx(2e-3)
    assert best.model.predict_s(8, 224) == pytest.approx(2e-5 * 8 * 224)
    assert {fit.form for fit in fits} == {"quadratic", "affine", "full", "tabulated"}


def test_prompts_behind_cached_tokens_are_predicted_by_every_form():
    grid = [(batch, length) for batch in (1, 2, 4) for length in LENGTHS]
    timings = points(lambda b, n: 1e-3 + 1e-7 * b * n * n, grid)
    timings += [Timing(2, 64, (1e-3 + 1e-7 * 2 * 64 * (64 + 2 * cached),) * 3, cached) for cached in (64, 128)]
    fits = fit_op(0, OpKind.PREFILL, timings)
    (best,) = [fit for fit in fits if fit.chosen]
    assert best.form == "full"
    assert best.mape < 1e-6
    assert best.model.predict_s(1, 100, 1000) == pytest.approx(1e-3 + 1e-7 * 100 * 2100, rel=1e-3)


def test_a_missing_corner_is_the_polynomial_scaled_to_its_row():
    known = {(b, n): 2.0 * SMOOTH.predict_s(b, n) for b in (1, 4) for n in LENGTHS if b * n <= 512}
    table = tabulate(known, SMOOTH)
    assert table is not None
    assert table.at_s(4, 256) == pytest.approx(2.0 * SMOOTH.predict_s(4, 256))
    assert table.at_s(4, 64) == known[4, 64]


@pytest.mark.parametrize(
    "grid",
    [
        [(1, 16), (1, 64)],  # two lengths are a straight line
        [(4, n) for n in LENGTHS],  # nothing about other batches
        [(b, n) for b, n in zip(range(1, 8), LENGTHS, strict=True)],  # a diagonal is no grid
    ],
)
def test_what_is_no_grid_gives_no_table(grid):
    assert tabulate(dict.fromkeys(grid, 1.0), SMOOTH) is None


def test_a_point_is_judged_by_its_neighbours():
    known = {(b, n): float(b * n) for b in (1, 2, 3) for n in (10, 20, 30)}
    assert between(known, 2, 20) == pytest.approx(40.0)
    assert between(known, 1, 20) == pytest.approx(20.0)  # along one axis
    assert between(known, 1, 10) is None
