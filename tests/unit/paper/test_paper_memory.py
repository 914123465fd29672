"""Schedules and memory limits as axes of the evaluation."""

from dataclasses import replace

import pytest

from bench.paper import memory, schedules
from bench.paper.config import BASELINE, PaperConfig
from bench.paper.outcome import row
from bench.paper.scenario import Point, Run, cluster, work
from services.simulator.types import Microbatch

_SMALL = PaperConfig(axis_rates=(16.0,), axis_shares=(0.5,), seeds=(0,), num_tasks=80)


def _rows(labelled):
    return [{**row(run), "label": label} for label, run in labelled]


def test_a_run_sets_nodes_and_groups_up():
    run = Run(Point(16.0, 0.5, 0.06), BASELINE, 0, 40, accumulation=4, node=(("training_schedule", "1f1b"),))
    assert {node.core.training_schedule for node in cluster(run)} == {"1f1b"}
    assert {task.accumulation for task in work(run) if isinstance(task, Microbatch)} == {4}
    plain = [replace(t, accumulation=1) if isinstance(t, Microbatch) else t for t in work(run)]
    assert plain == work(replace(run, accumulation=1)), "the input is the same otherwise"


def test_links_get_slower_and_only_the_first_condition_has_no_limit():
    limits = [memory.CONDITIONS[name] for name in memory.LINKS]
    assert [condition.memory is None for condition in limits] == [True] + [False] * (len(limits) - 1)
    speeds = [condition.link_bytes_per_s for condition in limits]
    assert speeds == sorted(speeds, reverse=True)


def test_the_longest_micro_batch_fits_a_stage():
    assert memory.LENGTHS.shape.longest * memory.MEMORY.activation_bytes_per_token <= memory.MEMORY.budget_bytes


@pytest.fixture(scope="module")
def rows():
    return _rows(
        labelled for labelled in memory.runs(replace(_SMALL, num_tasks=240)) if "round_robin" not in labelled[0]
    )


def test_only_where_nothing_waits_tasks_are_lost(rows):
    lost = {r["label"].split(", ", 1)[1] for r in rows if r["lost_share"] > 0.0}
    assert lost == {memory.FAILS}
    assert {r["label"].split(", ", 1)[1] for r in rows if r["may_fail"]} == {memory.FAILS}
    assert all(r["n_ok"] == r["n_tasks"] for r in rows if not r["may_fail"])


def test_hasty_forwards_move_more(rows):
    moved = {r["label"]: r["moved_gb"] for r in rows}
    assert moved[f"lemix, {memory.HASTY}"] > 2.0 * moved["lemix, 25 GB/s"]


def test_tables_and_charts_show_every_condition():
    everything = _rows(memory.runs(_SMALL))
    summary = memory.summarise(everything)
    assert summary["memory"]["policies"][f"{BASELINE}, {memory.NO_LIMIT}"]["throughput_ratio"]["geomean"] == 1.0
    for shown in memory.tables(summary):
        assert [cells[0] for cells in shown.rows] == list(memory.CONDITIONS)
        assert {len(cells) for cells in shown.rows} == {len(shown.head)}
    (section,) = memory.sections(_SMALL, summary)
    assert section.count("<table") == len(memory.tables(summary))


def test_schedules_are_compared_with_asynchronous_separate_clusters():
    labels = dict(schedules.runs(_SMALL))
    assert dict(labels[BASELINE].node)["training_schedule"] == "async"
    assert dict(labels["lemix, gpipe"].node)["training_schedule"] == "gpipe"
    assert {run.accumulation for run in labels.values()} == {schedules.ACCUMULATION}
