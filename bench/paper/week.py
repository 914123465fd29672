"""A week of clumped traffic that follows the day: does anything starve, do queues drift?"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.paper.charts import Panel, Series, panels
from bench.paper.config import BASELINE, SUBJECT, PaperConfig
from bench.paper.family import Family, Labelled, Row, Shown
from bench.paper.scenario import Point, Run
from bench.paper.variants import everywhere, html
from bench.report.colors import policy_color
from bench.report.table import percent
from services.charts.svg import legend
from services.simulator.arrivals import DAY_S
from services.simulator.types import SimulationResult, TaskRecord

NAME = "week"
#: Slow stages: a week of the grid's rates would be millions of tasks.
POINT = Point(0.1, 0.5, 3.0)
SWING, CV = 0.8, 4.0


def runs(config: PaperConfig) -> list[Labelled]:
    """As many tasks as so many days bring."""
    num_tasks = round(POINT.rate * DAY_S * config.days)
    return [
        labelled
        for policy in (BASELINE, SUBJECT)
        for labelled in everywhere(
            policy, [POINT], config.first_seed, num_tasks, policy, swing=SWING, cv=CV, also=by_day
        )
    ]


def by_day(run: Run, result: SimulationResult) -> dict[str, Any]:
    """Longest waits, and mean queues per day."""
    last_s = max(record.work.arrival_s for record in result.tasks.values())
    queues = {"requests": list(result.requests()), "microbatches": list(result.microbatches())}
    return {
        "longest_request_s": _longest(queues["requests"]),
        "longest_training_s": _longest(queues["microbatches"]),
        "slo_s": run.slo.ttft_s,
        "days": {name: mean_open(records, last_s) for name, records in queues.items()},
    }


def _longest(records: Iterable[TaskRecord]) -> float | None:
    """From arrival to end; None when one never ended."""
    longest_s = max((record.response_s for record in records), default=0.0)
    return longest_s if longest_s < math.inf else None


def mean_open(records: Iterable[TaskRecord], until_s: float) -> list[float]:
    """Tasks that had arrived and not ended, averaged over every day until then. A last day may be a bit short: the
    traffic is so many tasks and not so many days; less than half a day more does not count."""
    days = max(1, round(until_s / DAY_S))
    edges_s = [day * DAY_S for day in range(days)] + [min(days * DAY_S, until_s)]
    open_s = [0.0] * days
    for record in records:
        begin_s, end_s = record.work.arrival_s, record.ended_s if record.ended_s is not None else math.inf
        for day in range(int(begin_s // DAY_S), days):
            if end_s <= edges_s[day]:
                break
            open_s[day] += max(0.0, min(end_s, edges_s[day + 1]) - max(begin_s, edges_s[day]))
    return [total_s / (edges_s[day + 1] - edges_s[day]) for day, total_s in enumerate(open_s)]


def drift(per_day: Sequence[float]) -> float:
    """Slope of a line through the days, tasks per day."""
    return statistics.linear_regression(range(len(per_day)), per_day).slope if len(per_day) > 1 else 0.0


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Policy -> figures of every seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        names = ("seed", "slo_attainment", "longest_request_s", "longest_training_s", "mean_training_response_s")
        figures = {name: row[name] for name in names}
        figures["mean_open"] = row["days"]
        figures["drift_per_day"] = {name: drift(per_day) for name, per_day in row["days"].items()}
        found.setdefault(row["label"], []).append(figures)
    about = {"tasks": rows[0]["n_tasks"], "mean_forward_s": POINT.mean_forward_s, "slo_s": rows[0]["slo_s"]}
    return {NAME: {**about, "swing": SWING, "cv": CV, "policies": found}}


def tables(summary: Mapping[str, Any]) -> list[Shown]:
    """A column per policy: its worst seed."""
    found = summary[NAME]
    policies = found["policies"]
    rows: list[tuple[str, ...]] = [
        ("SLO kept", *(percent(min(seed["slo_attainment"] for seed in seeds)) for seeds in policies.values())),
        ("longest request", *(_shown([seed["longest_request_s"] for seed in seeds]) for seeds in policies.values())),
        ("mean training", *(_shown([s["mean_training_response_s"] for s in seeds]) for seeds in policies.values())),
        ("longest training", *(_shown([seed["longest_training_s"] for seed in seeds]) for seeds in policies.values())),
    ]
    for name, kind in (("requests", "requests"), ("microbatches", "micro-batches")):
        means = (max(statistics.fmean(seed["mean_open"][name]) for seed in seeds) for seeds in policies.values())
        slopes = (max((seed["drift_per_day"][name] for seed in seeds), key=abs) for seeds in policies.values())
        rows.append((f"{kind} open, mean", *(f"{value:.2f}" for value in means)))
        rows.append((f"{kind} open, drift per day", *(f"{value:+.3f}" for value in slopes)))
    return [Shown(f"A week, {found['tasks']:,} tasks, promise {found['slo_s']:g} s", ("", *policies), rows)]


def _shown(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known):,.0f} s" if len(known) == len(values) else "never ended"


def sections(config: PaperConfig, summary: Mapping[str, Any]) -> list[str]:
    """Queues by day."""
    del config
    found = summary[NAME]
    items = [
        Panel(title, "day", [_series(label, seeds, name) for label, seeds in found["policies"].items()])
        for name, title in (("requests", "requests open, mean of the day"), ("microbatches", "micro-batches open"))
    ]
    (shown,) = tables(summary)
    keys = legend((label, policy_color(label)) for label in found["policies"])
    return [
        f"<h2>A week</h2><p>{found['tasks']:,} tasks, half of them training, on stages with a mean forward of "
        f"{POINT.mean_forward_s:g} s. The rate follows the day (mean {POINT.rate:g} per second, ±{100 * SWING:g} %) "
        f"and arrivals clump: Gamma gaps with a coefficient of variation of {CV:g}. Longest: from arrival to end. "
        f"Drift: slope of the daily means.</p>{keys}"
        f'<div class="figure">{panels(items, "Queues by day", columns=2)}</div>'
        f"{html(shown)}"
    ]


def _series(label: str, seeds: Sequence[Mapping[str, Any]], name: str) -> Series:
    days = zip(*(seed["mean_open"][name] for seed in seeds), strict=True)
    points = [(float(day), min(v), statistics.median(v), max(v)) for day, v in enumerate(days, start=1)]
    return Series(label, policy_color(label), points)


WEEK = Family(NAME, runs, summarise, tables, sections)
