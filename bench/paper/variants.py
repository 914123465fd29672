"""Families that set variants side by side: every variant at every point and seed, against separate clusters."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bench.paper.charts import Bar, BarColumn, bars
from bench.paper.compare import against_baseline
from bench.paper.config import BASELINE, PaperConfig
from bench.paper.family import Family, Labelled, Row, Shown, nothing_more
from bench.paper.scenario import Point, Run
from bench.paper.table import COLUMNS
from bench.report.colors import policy_color
from bench.report.table import Column, cell
from services.charts.page import table
from services.charts.svg import text

Repetitions = Mapping[str, Sequence[Mapping[str, Any]]]
#: What says little about single axes: the charts and claims of the grid have it.
_LEFT_OUT = ("max", "max ratio", "makespan max")


def everywhere(
    label: str, points: Iterable[Point], seeds: Iterable[int], num_tasks: int, policy: str, **changes: Any
) -> list[Labelled]:
    """A variant on every point and seed; `changes` are fields of `Run`."""
    places = list(points)
    return [
        Labelled(label, replace(Run(point, policy, seed, num_tasks), **changes)) for seed in seeds for point in places
    ]


def compared(rows: Sequence[Row]) -> tuple[dict[str, Any], Repetitions]:
    """The family's part of the summary, and the figures of every seed by label."""
    first = sorted(rows, key=lambda row: row["label"] != BASELINE)
    medians, extents, repetitions = against_baseline([{**row, "policy": row["label"]} for row in first])
    baseline = medians[BASELINE]
    found = {
        "seeds": len(repetitions[BASELINE]),
        "points": baseline["points"],
        "tasks_per_point": max(row["n_tasks"] for row in rows),
        "policies": medians,
        "spread": extents,
    }
    return found, repetitions


def size(found: Mapping[str, Any]) -> str:
    """Points, seeds and tasks in words."""
    return (
        f"{count(found['points'], 'point')}, {count(found['seeds'], 'seed')}, "
        f"{found['tasks_per_point']:,} tasks per point"
    )


def side_by_side(
    name: str,
    title: str,
    words: str,
    runs: Callable[[PaperConfig], list[Labelled]],
    *,
    columns: Sequence[Column] = COLUMNS,
    then: Callable[[PaperConfig, Sequence[Row]], list[Labelled]] = nothing_more,
    claims: Callable[[Repetitions], list[dict[str, Any]]] = lambda repetitions: [],
) -> Family:
    """A family that is its variants' comparison with separate clusters and nothing else. words: HTML."""

    def summarise(rows: Sequence[Row]) -> dict[str, Any]:
        found, repetitions = compared(rows)
        return {name: found, "claims": claims(repetitions)}

    def tables(summary: Mapping[str, Any]) -> list[Shown]:
        return [comparison(title, summary[name], columns=columns)]

    def sections(config: PaperConfig, summary: Mapping[str, Any]) -> list[str]:
        del config
        return [section(title, words, summary[name], columns=columns)]

    return Family(name, runs, summarise, tables, sections, then)


def count(number: int, noun: str) -> str:
    """A number of things in words."""
    return f"{number} {noun}{'s' if number != 1 else ''}"


def comparison(title: str, found: Mapping[str, Any], *, columns: Sequence[Column] = COLUMNS) -> Shown:
    """The variants against separate clusters: medians over the seeds, the best in bold."""
    policies = found["policies"]
    used = [c for c in columns if c.title not in _LEFT_OUT and any(c.value(p) is not None for p in policies.values())]
    best = [column.best(policies) for column in used]
    names = list(policies)
    return Shown(
        f"{title} · {size(found)}",
        ("", *(column.title for column in used)),
        [(name, *(cell(column, policies[name]) for column in used)) for name in names],
        frozenset((names.index(name), place + 1) for place, name in enumerate(best) if name is not None),
    )


def captioned(shown: Shown) -> str:
    """The table for the page, below its title."""
    return f'<p class="soft">{text(shown.title)}</p>{html(shown)}'


def html(shown: Shown) -> str:
    """The table for the page."""
    rows = [
        [f"<b>{text(value)}</b>" if (row, column) in shown.bold else text(value) for column, value in enumerate(values)]
        for row, values in enumerate(shown.rows)
    ]
    return table([text(name) for name in shown.head], rows)


def figure(found: Mapping[str, Any], title: str) -> str:
    """Throughput over separate clusters and attainment, a bar each per variant; whiskers reach over the seeds."""
    names = list(found["policies"])
    columns = [
        BarColumn(
            "throughput over separate clusters",
            [_bar(found, name, ("throughput_ratio", "geomean")) for name in names],
            "{:.2f}×".format,
            strong=1.0,
        ),
        BarColumn(
            "SLO attainment", [_bar(found, name, ("attainment_mean",)) for name in names], "{:.0%}".format, limit=1.0
        ),
    ]
    labels = [(name, policy_color(policy_of(name))) for name in names]
    return f'<div class="figure">{bars(labels, columns, title)}</div>'


def _bar(found: Mapping[str, Any], name: str, path: Sequence[str]) -> Bar:
    middle, extent = found["policies"][name], found["spread"][name]
    for key in path:
        middle, extent = middle[key], extent[key]
    return Bar(extent[0], middle, extent[1])


def policy_of(label: str) -> str:
    """The policy that a label begins with, for its colour."""
    return label.split(",")[0].split(" ")[0].removesuffix("+")


def section(title: str, words: str, found: Mapping[str, Any], *, columns: Sequence[Column] = COLUMNS) -> str:
    """Heading, explanation, bars and table."""
    return (
        f"<h2>{text(title)}</h2><p>{words} {size(found)}.</p>"
        + figure(found, f"{title}: throughput over that of separate clusters, and attainment")
        + html(comparison(title, found, columns=columns))
    )
