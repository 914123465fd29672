"""The axis of dependent requests: a run of each kind, and what is made of the rows."""

import pytest

from bench.paper.config import PaperConfig
from bench.paper.outcome import row
from bench.paper.sessions import RATES, SESSIONS, WITHOUT

#: One place on every axis: the highest rate of each kind.
_CONFIG = PaperConfig(seeds=(0,), num_tasks=60, axis_rates=(8.0,))


@pytest.fixture(scope="module")
def rows():
    return [{**row(labelled.run), "label": labelled.label} for labelled in SESSIONS.runs(_CONFIG)]


def test_every_policy_serves_the_same_requests(rows):
    assert {row["label"] for row in rows} == {"lemix", WITHOUT, "least_loaded", "round_robin"}
    for kind in RATES:
        assert len({row["n_tasks"] for row in rows if row["kind"] == kind}) == 1
    assert all(row["n_ok"] == row["n_tasks"] > row["num_sessions"] for row in rows)


def test_every_rate_is_run_when_other_axes_have_several():
    rates = {labelled.run.point.rate for labelled in SESSIONS.runs(PaperConfig())}
    assert rates == {rate for rates in RATES.values() for rate in rates}


def test_only_lemix_predicts(rows):
    assert {row["label"] for row in rows if row["ttft_error_mean"] is not None} == {"lemix", WITHOUT}
    assert all(0.0 < row["saved_share"] < 1.0 for row in rows)


def test_knowing_sessions_makes_predictions_better(rows):
    for kind in RATES:
        error = {row["label"]: row["ttft_error_mean"] for row in rows if row["kind"] == kind}
        assert error["lemix"] < error[WITHOUT]


def test_the_summary_and_its_tables(rows):
    summary = SESSIONS.summarise(rows)
    assert {claim["name"] for claim in summary["claims"]} == {
        "sessions_prediction", "sessions_saved", "sessions_attainment",
    }  # fmt: skip
    chat, agent = SESSIONS.tables(summary)
    assert ("chat" in chat.title, "agent" in agent.title) == (True, True)
    assert all(len(cells) == len(chat.head) for cells in chat.rows)
    (section,) = SESSIONS.sections(_CONFIG, summary)
    assert section.count("<table") == section.count("<svg") == 2
