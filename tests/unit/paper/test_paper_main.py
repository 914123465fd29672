"""A quick run from the command line to the page."""

import json

import pytest

from bench.paper.__main__ import main, parse
from bench.paper.config import ALL_POLICIES, DEFAULT_POLICIES, PaperConfig, PaperError
from bench.paper.families import FAMILIES
from services.scheduler.core.policies import POLICIES
from tests.unit.pages import assert_self_contained, charts

_QUICK = ["--quick", "--processes", "1", "--policies", "separate,round_robin,lemix"]
_GRID = [*_QUICK, "--only", "grid"]


#: What the summary has whatever ran, and families whose key is not their name.
_COMMON = {"started_at", "git_commit", "machine", "seeds", "config", "seconds_total", "claims", "problems"}
_KEYS = {"streams": "vs_separate_streams"}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    path = tmp_path_factory.mktemp("paper")
    assert main([*_GRID, "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def summary(out):
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def page(out):
    return (out / "report.html").read_text()


def test_the_summary_has_the_published_keys(summary):
    assert {"git_commit", "started_at", "machine", "config", "seeds", "grid", "vs_separate", "spread", "claims"} <= set(
        summary
    )
    assert len(summary["grid"]) == 3 * 4
    assert len(summary["promises"]["points"]) == 4
    figures = summary["vs_separate"]["lemix"]
    assert set(figures) >= {
        "throughput_ratio", "attainment_ratio", "attainment_points", "efficiency", "makespan_ratio",
        "worst_response_slos", "attainment_weighted", "points", "excluded",
    }  # fmt: skip
    assert set(figures["throughput_ratio"]) == {"geomean", "max", "min"}
    assert {claim["verdict"] for claim in summary["claims"]} <= {"held", "missed", "unresolved"}
    assert summary["config"]["scheduler"]["max_waiting_training"] == 1024


def test_the_page_needs_nothing_from_outside(page):
    assert_self_contained(page)


def test_every_chart_is_well_formed_and_named(page):
    found = charts(page)
    assert len(found) == 8
    assert not any("nan" in chart for chart in found)


def test_every_claim_is_on_the_page(page, summary):
    for claim in summary["claims"]:
        assert claim["claim"] in page
    assert page.count("missed:") >= sum(claim["verdict"] == "missed" for claim in summary["claims"])


def test_the_same_run_gives_the_same_figures(summary, tmp_path, capsys):
    assert main([*_GRID, "--out", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "summary.json").read_text())
    assert (again["grid"], again["promises"]) == (summary["grid"], summary["promises"])
    printed = capsys.readouterr().out
    for claim in summary["claims"]:
        assert f"{claim['verdict']}  {claim['claim']}" in printed
    assert "round_robin" in printed
    assert "…" not in printed


@pytest.mark.parametrize("name", [family.name for family in FAMILIES if family.name != "grid"])
def test_every_family_runs_alone(name, tmp_path, capsys):
    assert main([*_QUICK, "--only", name, "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) - _COMMON == {_KEYS.get(name, name)}
    assert summary["problems"] == []
    page = (tmp_path / "report.html").read_text()
    assert_self_contained(page)
    assert charts(page)
    assert not any("nan" in chart for chart in charts(page))
    printed = capsys.readouterr().out
    assert "…" not in printed
    (family,) = (family for family in FAMILIES if family.name == name)
    cells = {cell for shown in family.tables(summary) for row in shown.rows for cell in row}
    assert cells
    assert {cell for cell in cells if cell not in printed} == set()
    for claim in summary["claims"]:
        assert f"{claim['verdict']}  {claim['claim']}" in printed


def test_a_run_of_several_families_is_simulated_once(tmp_path, capsys):
    """Of the streams, all but separate clusters with one stream are in the grid."""
    assert main([*_QUICK, "--only", "grid,streams", "--out", str(tmp_path)]) == 0
    assert "16 simulations" in capsys.readouterr().out


def test_defaults():
    config = parse([])
    assert config == PaperConfig()
    assert len(config.points()) == 75
    assert config.policies == DEFAULT_POLICIES
    assert config.num_processes >= 1


def test_policies_come_from_the_registry():
    assert set(ALL_POLICIES) == set(POLICIES)
    assert (ALL_POLICIES[0], ALL_POLICIES[-1]) == ("separate", "lemix")


def test_full_is_every_policy_and_more_seeds():
    config = parse(["--full"])
    assert config.policies == ALL_POLICIES
    assert len(config.seeds) == 10
    assert config.first_seed == config.seeds
    assert config.few_tasks == config.num_tasks
    assert parse(["--full", "--seeds", "5", "--policies", "separate"]).seeds == (5,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "separate,best"], "unknown policy 'best'; known: "),
        (["--policies", "lemix"], "--policies must name separate"),
        (["--policies", "separate,lemix,lemix"], "twice"),
        (["--seeds", ""], "--seeds names no seed"),
        (["--seeds", "1,x"], "--seeds must be whole numbers"),
        (["--seeds", "1,1"], "--seeds names a seed twice"),
        (["--seeds", "101"], "100 to 102 are kept for tuning"),
        (["--only", "grid,week,best"], "unknown family 'best'; known: grid, "),
        (["--only", ","], "--only names no family"),
        (["--processes", "-1"], "--processes must not be negative"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    with pytest.raises(PaperError):
        parse(arguments)


def test_usage_errors_are_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--polices", "lemix"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "paper: unrecognized arguments: --polices lemix (--help lists the options)\n"


def test_a_place_that_takes_no_results_is_told_before_the_runs(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file" / "paper")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("paper: --out: ")
    assert error.count("\n") == 1
