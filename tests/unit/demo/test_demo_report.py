"""The summary and the page made from it."""

import json
import re
from dataclasses import replace

import pytest

from bench.demo import figures, report
from bench.demo.config import ClusterConfig, DemoConfig
from bench.demo.summary import sharing_warnings, warnings
from bench.demo.table import COLUMNS
from bench.live.requests import Status
from bench.report.colors import policy_color
from bench.report.table import cell
from services.charts.svg import Chart, Scale, number
from tests.unit.demo import synthetic
from tests.unit.pages import assert_self_contained, charts


@pytest.fixture(scope="module")
def page():
    return report.render(synthetic.whole_summary(), synthetic.runs())


def test_the_page_needs_nothing_from_outside(page):
    assert_self_contained(page)


def test_every_chart_is_well_formed_and_named(page):
    found = charts(page)
    assert len(found) == 8


def test_every_policy_is_in_table_and_charts(page):
    for run in synthetic.runs():
        assert f"<td>{run.policy}</td>" in page
        assert policy_color(run.policy) in page


def test_problems_are_told_and_escaped():
    summary = synthetic.whole_summary()
    assert "went wrong" not in report.render(summary, synthetic.runs())
    summary["problems"] = ["lemix-0: r1 failed: <b>"]
    assert "lemix-0: r1 failed: &lt;b&gt;" in report.render(summary, synthetic.runs())


def test_a_busy_machine_is_told():
    measured = {"lemix": [{"cpu_share": {"other_programs": 0.05}}, {"cpu_share": {"other_programs": 0.4}}]}
    (warning,) = warnings(measured | {"separate": [{"cpu_share": {"other_programs": 0.2}}]})
    assert "40 % (lemix), 20 % (separate)" in warning
    assert warnings({"lemix": [{"cpu_share": {"other_programs": 0.05}}]}) == []
    summary = {**synthetic.whole_summary(), "warnings": ["lemix: busy"]}
    assert "lemix: busy" in report.render(summary, synthetic.runs())


def test_stages_that_share_cores_are_told():
    config = DemoConfig(cluster=ClusterConfig(nodes=2, stages=2))
    told = ["4 stage workers share 2 cores: the figures say nothing about the policies"]
    assert sharing_warnings(config, 2) == told
    assert sharing_warnings(config, 4) == []
    shared = synthetic.whole_summary(cores=1)
    assert shared["warnings"][0].startswith("2 stage workers share 1 core:")
    assert {claim["verdict"] for claim in shared["claims"]} == {"unresolved"}


def test_one_policy_alone_gives_a_page_too():
    summary = synthetic.whole_summary()
    summary["policies"] = {"separate": summary["policies"]["separate"]}
    summary["claims"] = []
    assert "<h2>Claims" not in report.render(summary, synthetic.runs()[:1])


def test_a_run_in_which_everything_failed_gives_a_page_too():
    run = synthetic.run_record("lemix")
    failed = [
        replace(item, status=Status.FAILED, first_token_s=None, last_token_s=None, reference_loss=None)
        for item in run.requests
    ]
    page = report.render(synthetic.whole_summary(), [replace(run, requests=failed)])
    assert "Response times" in page


def test_the_summary_is_json_with_the_published_keys():
    summary = json.loads(json.dumps(synthetic.whole_summary()))
    assert {"slo", "policies", "seconds_total", "git_commit", "started_at", "machine", "config", "seed"} <= set(summary)
    assert summary["slo"] == {"ttft_ms": pytest.approx(80.0), "tpot_ms": pytest.approx(12.0)}
    assert set(summary["policies"]) == {"separate", "round_robin", "lemix", "lemix_no_sync"}
    assert {"p50", "p99"} == set(summary["policies"]["lemix"]["ttft_ms"])


def test_a_single_repetition_has_no_spread():
    assert synthetic.whole_summary(1)["spread"] == {}


def test_curves_of_failed_requests_stay_below_one():
    run = synthetic.run_record("lemix")
    half = [
        item if index % 2 else replace(item, status=Status.REJECTED, first_token_s=None)
        for index, item in enumerate(run.requests)
    ]
    points = figures._cdf(half, lambda item: item.ttft_s)
    assert points[-1][1] == pytest.approx(0.5, abs=0.01)


def _moving(run):
    return figures._moving_mean(run, figures._losses(run))


def test_loss_against_a_baseline_is_paired_by_request():
    run = synthetic.run_record("lemix")
    better = [replace(item, reference_loss=item.reference_loss - 0.5) for item in run.requests if item.at_s > 3]
    chart = figures.loss_against([run, replace(run, policy="better", requests=better)], run, None)
    heights = [
        {point.split(",")[1] for point in line.split()} for line in re.findall(r'<polyline[^>]*points="([^"]*)"', chart)
    ]
    assert [len(levels) for levels in heights] == [1, 1]  # both level, whatever the prompts were
    assert float(heights[0].pop()) < float(heights[1].pop())  # lower on the page is better


def test_moving_mean_does_not_smear_the_drift():
    run = synthetic.run_record("lemix")
    step = [replace(item, reference_loss=1.0 if item.at_s < run.drift_s else 2.0) for item in run.requests]
    assert {y for _, y in _moving(replace(run, requests=step))} == {1.0, 2.0}


@pytest.mark.parametrize(
    ("scale", "value", "pixel"),
    [
        (Scale(0, 10, 0, 100), 5, 50),
        (Scale(0, 10, 100, 0), 5, 50),
        (Scale(1, 100, 0, 100, log=True), 10, 50),
        (Scale(0, 10, 0, 100), 99, 100),
        (Scale(3, 3, 7, 100), 3, 7),
    ],
)
def test_scales(scale, value, pixel):
    assert scale(value) == pytest.approx(pixel)


def test_ticks_are_round_and_inside():
    assert Scale(0.0, 1.0, 0, 1).ticks(5) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Scale(7.0, 43.0, 0, 1).ticks(4) == [10.0, 20.0, 30.0, 40.0]
    assert Scale(3.0, 30.0, 0, 1, log=True).ticks() == [5.0, 10.0, 20.0]
    assert Scale(0.5, 2000.0, 0, 1, log=True).ticks() == pytest.approx([1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0])


def test_boxes_share_one_path():
    chart = Chart.plot(100, 100, (0, 10), (0, 1))
    chart.boxes([(0, 1), (2, 3)], 0, 10, "red")
    chart.boxes([], 0, 10, "blue")
    assert len(chart.parts) == 1
    assert chart.parts[0].count("M") == 2


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (0.05, "0.05"), (12.345, "12.3"), (1234.5, "1,234")])
def test_numbers(value, text):
    assert number(value) == text


def test_cells():
    attainment = COLUMNS[0]
    assert cell(attainment, {"slo_attainment": 0.987}) == "98.7 %"
    assert cell(attainment, {"slo_attainment": [0.9, 0.95]}) == "90.0 % – 95.0 %"
    assert cell(attainment, {"slo_attainment": None}) == "–"
    assert cell(COLUMNS[1], {"ttft_ms": None}) == "–"


def test_best_follows_the_direction():
    policies = {"a": {"slo_attainment": 0.9, "ttft_ms": {"p50": 5.0}}, "b": {"slo_attainment": 0.8}}
    assert COLUMNS[0].best(policies) == "a"
    assert COLUMNS[1].best(policies) is None


def test_a_tie_as_shown_has_no_best():
    assert COLUMNS[0].best({"a": {"slo_attainment": 0.95001}, "b": {"slo_attainment": 0.95}}) is None
