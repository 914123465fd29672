"""The axis of forecasts: a run of each way to predict, and what is made of the rows."""

import pytest

from bench.paper.config import PaperConfig
from bench.paper.forecast import AHEAD, ANALYTIC, FORECAST
from bench.paper.outcome import row

_CONFIG = PaperConfig(seeds=(0, 1), num_tasks=200, axis_rates=(16.0,), axis_shares=(0.5,))


@pytest.fixture(scope="module")
def rows():
    return [{**row(labelled.run), "label": labelled.label} for labelled in FORECAST.runs(_CONFIG)]


def test_both_ways_are_run_on_the_same_work(rows):
    assert {(row["mode"], row["label"]) for row in rows} == {
        (mode, f"{mode}, {way}") for mode in ("prefill", "decode") for way in ("separate", ANALYTIC, AHEAD)
    }
    assert {row["n_tasks"] for row in rows} == {60}
    assert all("ttft_error_mean" not in row for row in rows if row["policy"] == "separate")


def test_running_nodes_ahead_predicts_better(rows):
    for mode in ("prefill", "decode"):
        of = {row["label"]: row for row in rows}
        ahead, arithmetic = of[f"{mode}, {AHEAD}"], of[f"{mode}, {ANALYTIC}"]
        assert ahead["ttft_error_mean"] < 0.5 * arithmetic["ttft_error_mean"]
        assert ahead["ttft_error_median"] < 0.01 < arithmetic["ttft_error_median"]


def test_the_summary_and_its_table(rows):
    summary = FORECAST.summarise(rows)
    assert [(claim["name"], claim["verdict"]) for claim in summary["claims"]] == [
        ("forecast_error_prefill", "held"),
        ("forecast_error_decode", "held"),
    ]
    (shown,) = FORECAST.tables(summary)
    assert [cells[0] for cells in shown.rows] == [
        f"{mode}, {way}" for mode in ("prefill", "decode") for way in (ANALYTIC, AHEAD)
    ]
    assert all(len(cells) == len(shown.head) for cells in shown.rows)
    (section,) = FORECAST.sections(_CONFIG, summary)
    assert section.count("<table") == section.count("<svg") == 1
