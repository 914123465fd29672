"""Short simulations of the benchmark's cluster."""

import io
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bench.colocation import report
from bench.colocation.claims import claims
from bench.colocation.config import ColocationConfig
from bench.colocation.measure import staleness
from bench.colocation.scenario import promise, rows, run_of, simulate
from bench.colocation.study import Study
from services.latency import OpKind
from services.simulator.types import OpRecord, Request, SimulationResult, StageUse, TaskRecord
from tests.unit.pages import assert_self_contained, charts

CONFIG = ColocationConfig(seeds=(0,), seconds=4.0, shares=(0.5, 1.0), policies=("separate", "lemix"), tolerance=0.5)
STEP, SYNC = OpKind.OPTIMIZER_STEP, OpKind.WEIGHT_SYNC


def test_training_uses_what_serving_leaves_and_requests_keep_their_promise():
    off = simulate(run_of(CONFIG, "lemix", 6.0, 1, trains=False))
    on = simulate(run_of(CONFIG, "lemix", 6.0, 1, trains=True))
    assert off.num_requests == on.num_requests > 10
    assert off.trained_tokens == 0
    assert off.training_s == 0.0
    assert off.staleness_p50_s is None
    assert on.num_kept >= on.num_requests - 1
    assert on.trained_tokens > 0
    assert on.trained_tokens % CONFIG.training.tokens == 0
    assert 0.0 < on.trained_work_s <= on.stage_s - on.serving_s
    assert on.serving_s + on.training_s <= on.stage_s
    assert on.stage_s == pytest.approx(4 * 2 * 4.0)


def test_the_same_run_gives_the_same_figures():
    run = run_of(CONFIG, "lemix", 5.0, 3, trains=True)
    assert simulate(run) == simulate(run)


def test_with_nothing_to_serve_the_run_ends_with_its_time():
    alone = simulate(run_of(CONFIG, "lemix", 0.0, 0, trains=True))
    assert alone.num_requests == 0
    assert alone.serving_s == 0.0
    assert alone.training_s > 0.8 * alone.stage_s


def test_the_promise_is_five_times_what_the_mean_request_takes_alone():
    slo = promise(CONFIG.profile)
    assert 0.3 < slo.ttft_s < 0.6
    assert 0.03 < slo.tpot_s < 0.08


def test_a_trace_is_followed_at_the_rate_asked_for(tmp_path: Path):
    path = tmp_path / "trace.csv"
    lines = ["arrival_s,prompt_tokens,output_tokens", *(f"{i},{100 + i},5000" for i in range(101))]
    path.write_text("\n".join(lines) + "\n")
    run = replace(run_of(CONFIG, "lemix", 4.0, 1, trains=False), seconds=6.0, trace=path)
    found = rows(run)
    assert 20 <= len(found) <= 26
    assert all(0.0 <= row.arrival_s < run.seconds for row in found)
    assert {row.output_tokens for row in found} == {run.max_tokens}
    # Four times round and 9 of its 25 seconds on.
    later = rows(replace(run, seed=19, seconds=5.75))
    assert 20 <= len(later) <= 26
    assert later[0].prompt_tokens > 130
    assert all(earlier.arrival_s <= row.arrival_s for earlier, row in itertools.pairwise(later))


def _op(node_id, kind, end_s, subject=""):
    return OpRecord(node_id, 0, kind, end_s - 0.1, end_s, (), subject)


def test_staleness_is_the_age_of_the_newest_step_in_the_weights_wherever_it_was_made():
    firsts = [("a", 0.5), ("a", 3.0), ("b", 3.0), ("b", 6.0)]
    tasks = {
        str(index): TaskRecord(Request(str(index), 0.0, 1, 1, 1), node_id=node_id, first_token_s=at_s)
        for index, (node_id, at_s) in enumerate(firsts)
    }
    ops = [
        _op("a", STEP, 1.0),
        _op("a", STEP, 2.0),
        _op("a", SYNC, 3.5, "s1/snapshot"),
        _op("a", STEP, 4.0),
        _op("b", SYNC, 5.0, "s1/apply"),
    ]
    result = SimulationResult(tasks, {("a", 0): StageUse(), ("b", 0): StageUse()}, [], [], 6.0, len(ops), ops)
    # Before any step, after a's second one, b still untrained, b with what a had at its snapshot.
    assert staleness(result) == [0.5, 1.0, 3.0, 4.0]


def test_a_study_leaves_every_figure_and_a_page_that_stands_alone():
    said: list[str] = []
    found = Study(CONFIG, lambda runs: [simulate(run) for run in runs], said.append).run()
    assert {row["policy"] for row in found["rates"]} == {"separate", "lemix"}
    assert set(found["at_half_capacity"]) == {"separate", "lemix"}
    assert found["capacity_rps"] == max(value["rate"] for value in found["capacities"].values())
    assert {row["trains"] for row in found["heterogeneous"]["rates"]} == {True, False}
    assert said
    slo = promise(CONFIG.profile)
    summary = {
        **found,
        "live": None,
        "claims": claims(found),
        "config": CONFIG.to_json(),
        "slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s},
        "machine": {"cpu": "a processor", "cores": 2},
        "started_at": "2026-01-01T00:00:00+00:00",
        "git_commit": "0" * 12,
        "seconds_total": 1.0,
    }
    page = report.render(summary)
    assert_self_contained(page)
    assert len(charts(page)) == 4
    assert page.index("Definitions") < page.index("Claims")
    assert "A quick run" not in page
    assert "A quick run" in report.render({**summary, "config": {**summary["config"], "is_quick": True}})
    best = max(found["capacities"], key=lambda policy: found["capacities"][policy]["rate"])
    assert report.meanings(summary)[-2].endswith(best)
    terminal = Console(width=80, record=True, file=io.StringIO())
    for item in report.terminal_tables(summary):
        terminal.print(item)
    lines = [*report.meanings(summary), *terminal.export_text().splitlines()]
    assert all(len(words) <= 80 and "…" not in words for words in lines)
    assert len(report.terminal_tables(summary)) == 3
    assert len(report.claim_lines(summary)) == 5
