"""Speed of the simulator: `python -m bench.simulator`.

Operations of pipeline stages per second of CPU time, with every decision behind them, in one process that collects
garbage as always. The inputs are those of `make paper`. Writes `out/bench/simulator.json` and a page.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.paper.scenario import DECODE, Point, Run, cluster, configuration, work
from bench.report.summary import run_facts, write_summary
from services.charts import page, svg
from services.simulator.cluster import Simulation

SUBJECT = "lemix"
POLICIES = (SUBJECT, "separate", "paper_additive")
#: A place in the middle of the grid, the same with decoding, and twice the load on twice the nodes.
PLACES: Mapping[str, Run] = {
    "prefill, 4 nodes": Run(Point(16.0, 0.5, 0.06), SUBJECT, 0, 1000),
    "decode, 4 nodes": Run(Point(16.0, 0.5, 0.06), SUBJECT, 0, 300, mode=DECODE),
    "prefill, 8 nodes": Run(Point(32.0, 0.5, 0.06), SUBJECT, 0, 1000, nodes=8),
}
#: Of `SUBJECT` at its slowest place.
TARGET_OPS_PER_S = 30_000


@dataclass(frozen=True, slots=True)
class Row:
    """One policy at one place; speeds are medians of the repetitions, with the slowest and the fastest."""

    place: str
    policy: str
    ops: int
    decisions: int
    ops_per_s: float
    ops_per_s_min: float
    ops_per_s_max: float
    decisions_per_s: float


def simulate(run: Run) -> tuple[int, int, float]:
    """Operations, decisions and CPU seconds of one simulation; its tasks were drawn before."""
    tasks, nodes = work(run), cluster(run)
    gc.collect()
    begin_s = time.process_time()
    result = Simulation(configuration(run), nodes, tasks).run()
    return result.num_ops, len(result.decisions), time.process_time() - begin_s


def measure(repeat: int) -> list[Row]:
    """Every policy at every place; repetitions are interleaved so that drift of the machine hits all alike."""
    samples: dict[tuple[str, str], list[tuple[int, int, float]]] = {}
    for _ in range(repeat + 1):
        for place, run in PLACES.items():
            for policy in POLICIES:
                samples.setdefault((place, policy), []).append(simulate(replace(run, policy=policy)))
    return [_row(place, policy, repetitions[1:]) for (place, policy), repetitions in samples.items()]


def _row(place: str, policy: str, repetitions: Sequence[tuple[int, int, float]]) -> Row:
    speeds = [ops / cpu_s for ops, _, cpu_s in repetitions]
    ops, decisions, _ = repetitions[0]
    middle = statistics.median(speeds)
    return Row(place, policy, ops, decisions, middle, min(speeds), max(speeds), middle * decisions / ops)


def report(rows: Sequence[Row], repeat: int) -> dict[str, Any]:
    """What the summary tells of this benchmark, and whether the target holds."""
    slowest = min((row for row in rows if row.policy == SUBJECT), key=lambda row: row.ops_per_s)
    return {
        "config": {"repeat": repeat, "seed": 0, "tasks": {place: run.num_tasks for place, run in PLACES.items()}},
        "simulator": [asdict(row) for row in rows],
        "target": {
            "policy": SUBJECT,
            "place": slowest.place,
            "ops_per_s": TARGET_OPS_PER_S,
            "slowest_ops_per_s": slowest.ops_per_s,
            "met": slowest.ops_per_s >= TARGET_OPS_PER_S,
        },
    }


def verdict(target: Mapping[str, Any]) -> str:
    """The target in one line."""
    return (
        f"{target['policy']}, slowest place ({target['place']}): {target['slowest_ops_per_s']:,.0f} operations/s "
        f"(target {target['ops_per_s']:,}): {'met' if target['met'] else 'missed'}"
    )


def render(summary: Mapping[str, Any]) -> str:
    """The page."""
    head = ("place", "policy", "operations", "decisions", "operations/s", "slowest to fastest", "decisions/s")
    cells = [
        [
            svg.text(row["place"]),
            svg.text(row["policy"]),
            *(f"{row[key]:,}" for key in ("ops", "decisions")),
            f"{row['ops_per_s']:,.0f}",
            f"{row['ops_per_s_min']:,.0f} to {row['ops_per_s_max']:,.0f}",
            f"{row['decisions_per_s']:,.0f}",
        ]
        for row in summary["simulator"]
    ]
    target = summary["target"]
    limit = f"at least {target['ops_per_s']:,} operations/s"
    return page.document(
        "LeMix: speed of the simulator",
        [
            "<h1>Speed of the simulator</h1>",
            "<p>Operations of pipeline stages per second of CPU time on one core, decisions included; medians.</p>",
            f"<p>{svg.text(verdict(target))} {page.chip('held' if target['met'] else 'missed', limit)}</p>",
            page.table(head, cells),
            page.facts({"machine": summary["machine"]["cpu"], "commit": summary["git_commit"]}),
            page.configuration(summary["config"]),
        ],
    )


def main() -> None:
    """Measure, print the table, write the summary and the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.simulator", description="Speed of the simulator.")
    parser.add_argument("--repeat", type=int, default=7, help="repetitions, after one that does not count")
    parser.add_argument("--out", type=Path, default=Path("out/bench/simulator.json"))
    args = parser.parse_args()
    if args.repeat < 1:
        parser.error("--repeat must be at least 1")
    facts = run_facts()
    rows = measure(args.repeat)
    print(f"{'place':<18}{'policy':<16}{'ops':>8}{'decisions':>11}{'ops/s':>9}{'(min-max)':>18}{'decisions/s':>13}")
    for row in rows:
        spread = f"({row.ops_per_s_min:,.0f}-{row.ops_per_s_max:,.0f})"
        counts = f"{row.place:<18}{row.policy:<16}{row.ops:>8,}{row.decisions:>11,}"
        print(f"{counts}{row.ops_per_s:>9,.0f}{spread:>18}{row.decisions_per_s:>13,.0f}")
    summary = facts | report(rows, args.repeat)
    print(verdict(summary["target"]))
    write_summary(args.out, summary, render(summary))


if __name__ == "__main__":
    main()
