"""Measures, summary and page."""

import json
import math

import pytest
import torch

from bench.convergence import report, summary
from bench.convergence.config import Run, StudyConfig, runs
from bench.convergence.evaluate import distance, divergence
from tests.unit.pages import assert_self_contained, charts

CONFIG = StudyConfig(updates=400, seeds=2)
FACTS = {
    "started_at": "2026-01-01T00:00:00+00:00",
    "git_commit": "abc",
    "machine": {"cpu": "a processor", "cores": 2},
    "model": {"parameters": 1_200_000, "heldout_loss": {"docs": 2.0, "code": 3.0}},
    "seconds_total": 12.0,
}


def test_distance_is_relative_to_the_mean():
    apart = [
        {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([[4.0]])},
        {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([[4.0]])},
    ]
    assert distance(apart) == pytest.approx(math.sqrt(2.0 / 24.0))
    assert distance(apart[:1]) == 0.0


def test_divergence_is_the_mean_over_ordered_pairs():
    p, q = torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[0.25, 0.75]]])
    expected = 0.5 * (0.5 * math.log(2.0) + 0.5 * math.log(2.0 / 3.0) + 0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert divergence([p.log(), q.log()]) == pytest.approx(expected)
    assert divergence([p.log()]) == divergence([p.log(), p.log()]) == 0.0


def result(run: Run, loss: float):
    points = [
        {"updates": at, "loss": loss + 1.0 / at, "best": loss, "worst": loss + 0.1, "distance": 0.01, "kl": 0.002}
        for at in (200, 400)
    ]
    return {"points": points, "rounds": 3, "training_loss": loss, "seconds": 1.0 + run.seed}


@pytest.fixture
def whole():
    losses = {
        "one_trainer": 2.0,
        "none": 2.4,
        "average_1": 2.1,
        "average_10": 2.1,
        "average_100": 2.2,
        "checkpoint_100": 2.3,
    }
    results = {run: result(run, losses[run.policy.name] + 0.02 * run.seed) for run in runs(CONFIG)}
    return summary.build(CONFIG, results, FACTS, "some text")


def test_the_summary_has_a_row_per_contestant_and_is_json(whole):
    assert [(row["policy"], row["replicas"]) for row in whole["results"][:3]] == [
        ("one_trainer", 1), ("none", 2), ("average_1", 2),
    ]  # fmt: skip
    none = whole["results"][1]
    assert none["final"]["loss"] == pytest.approx(2.41 + 1 / 400)
    assert none["spread"]["loss"] == pytest.approx([2.4 + 1 / 400, 2.42 + 1 / 400])
    assert whole["results"][0]["final"]["over_reference"] == 1.0
    assert json.loads(json.dumps(whole))["updates"] == 400


def test_in_equal_time_one_trainer_has_made_a_share_of_the_updates():
    config = StudyConfig(updates=400, seeds=1, replicas=(2, 4), policies=("none", "checkpoint_100"))
    results = {run: result(run, 2.0) for run in runs(config)}
    rows = {
        (row["policy"], row["replicas"]): row["final"] for row in summary.build(config, results, FACTS, "")["results"]
    }
    last, middle = 2.0 + 1 / 400, 2.0 + 1 / 200
    assert rows["none", 2]["over_reference_in_time"] == pytest.approx(last / middle)
    assert rows["none", 4]["over_reference_in_time"] == pytest.approx(last / middle), "not measured before 200 updates"
    assert rows["checkpoint_100", 4]["over_reference_in_time"] == 1.0


def test_claims_compare_seed_by_seed(whole):
    claims = {claim["name"]: claim for claim in whole["claims"]}
    assert claims["average_10_over_none_2"]["verdict"] == "held"
    assert claims["average_10_over_average_1_4"]["values"] == [1.0, 1.0]
    assert len(claims["average_10_over_none_4"]["values"]) == 2


def test_the_page_shows_every_policy_for_every_number_of_replicas(whole):
    page = report.render(whole)
    assert_self_contained(page)
    assert len(charts(page)) == 6
    for row in whole["results"]:
        assert row["title"] in page
