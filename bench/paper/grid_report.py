"""The grid's sections of the page."""

from collections.abc import Mapping
from typing import Any

from bench.paper import figures, limits_report
from bench.paper.config import BASELINE, SUBJECT, PaperConfig
from bench.paper.family import Shown
from bench.paper.outcome import details
from bench.paper.scenario import Point, Run
from bench.paper.table import COLUMNS
from bench.paper.variants import comparison, count
from bench.report.colors import policy_color
from bench.report.table import cell
from services.charts.page import table
from services.charts.svg import legend, text

#: The point whose single runs are shown: rate, training share, mean forward.
_SHOWN = Point(8.0, 0.5, 0.06)


def tables(summary: Mapping[str, Any]) -> list[Shown]:
    """The comparison with separate clusters."""
    baseline = summary["vs_separate"][BASELINE]
    found = {
        "policies": summary["vs_separate"],
        "points": baseline["points"],
        "seeds": len(summary["seeds"]),
        "tasks_per_point": summary["config"]["num_tasks"],
    }
    title = f"Grid, {len(summary['grid'])} simulations, overloading every policy: {baseline['excluded']}"
    return [comparison(title, found), *limits_report.tables(summary)]


def sections(config: PaperConfig, summary: Mapping[str, Any]) -> list[str]:
    """Tables and charts."""
    grid = figures.Grid.of(summary["grid"])
    keys = legend((name, policy_color(name)) for name in grid.policies)
    return [
        _comparison(summary),
        _over_rate(grid, keys),
        _heat_maps(grid),
        _efficiency(grid, keys),
        limits_report.section(summary),
        _one_point(config, keys),
        _overloaded(summary),
    ]


def _comparison(summary: Mapping[str, Any]) -> str:
    policies = summary["vs_separate"]
    head = ["policy", *(f'<span title="{text(column.help)}">{text(column.title)}</span>' for column in COLUMNS)]
    best = [column.best(policies) for column in COLUMNS]
    rows = []
    for name, metrics in policies.items():
        cells = [text(name)]
        for column, winner in zip(COLUMNS, best, strict=True):
            value = text(cell(column, metrics))
            value = f"<b>{value}</b>" if name == winner else value
            extent = text(cell(column, summary["spread"][name])) if len(summary["seeds"]) > 1 else ""
            cells.append(f"{value}<small>{extent}</small>" if extent else value)
        rows.append(cells)
    baseline = policies[BASELINE]
    return (
        f"<h2>All points together</h2><p>{baseline['points']} points, each policy against separate clusters on the "
        "same input. Medians of the seeds"
        + (", smallest – largest below" if len(summary["seeds"]) > 1 else "")
        + f". {baseline['excluded']} points, at which every policy keeps fewer than half of its promises, are left out "
        "of the smallest ratio and listed below. Bold: best.</p>" + table(head, rows)
    )


def _over_rate(grid: "figures.Grid", keys: str) -> str:
    return (
        "<h2>Throughput over the request rate</h2><p>Tasks per held node-second, over that of separate clusters (1). "
        "A column per share of training, a row per mean forward of a stage; bands reach from the smallest to the "
        f'largest seed.</p>{keys}<div class="figure">{figures.throughput_over_rate(grid)}</div>'
        "<h2>SLO attainment over the request rate</h2><p>Share of the requests answered within the promise.</p>"
        f'{keys}<div class="figure">{figures.attainment_over_rate(grid)}</div>'
    )


def _heat_maps(grid: "figures.Grid") -> str:
    others = [name for name in grid.policies if name != BASELINE]
    others.sort(key=lambda name: name != SUBJECT)
    parts = "".join(
        f"<details{' open' if index == 0 else ''}><summary>{text(name)}</summary>"
        f'<div class="figure">{figures.heat_maps(grid, name)}</div></details>'
        for index, name in enumerate(others)
    )
    return (
        "<h2>Where it pays</h2><p>Against separate clusters, point by point: throughput as a ratio, attainment as a "
        "difference in percentage points. Blue is better, red is worse. <i>Pale, grey number</i>: every policy is "
        f"overloaded there.</p>{parts}"
    )


def _efficiency(grid: "figures.Grid", keys: str) -> str:
    return (
        "<h2>Efficiency</h2><p>Least possible held node time over held node time, one dot per point. No policy can get "
        "above 100 %: the bound knows all arrivals and lengths in advance and need not keep a promise. The load is the "
        f'number of nodes that the offered work keeps busy.</p>{keys}<div class="figure">{figures.efficiency(grid)}'
        "</div>"
    )


def _one_point(config: PaperConfig, keys: str) -> str:
    points = config.points()
    point = _SHOWN if _SHOWN in points else points[len(points) // 2]
    runs = [details(Run(point, policy, config.seeds[0], config.num_tasks)) for policy in config.policies]
    name = (
        f"{point.rate:g} tasks/s, {100 * point.training_share:.0f} % training, mean forward "
        f"{1000 * point.mean_forward_s:g} ms, seed {config.seeds[0]}"
    )
    return (
        f"<h2>One point in detail</h2><p>{name}: {point.load_nodes:.1f} nodes' worth of work.</p>"
        f'<p><b>Nodes held</b></p><div class="figure">{figures.nodes_held(runs)}</div>'
        f'<p><b>Responses</b></p>{keys}<div class="figure">{figures.response_cdf(runs)}</div>'
    )


def _overloaded(summary: Mapping[str, Any]) -> str:
    points = summary["overloaded"]
    if not points:
        return ""
    policies = list(summary["vs_separate"])
    rows = [
        (
            f"{point['rate']:g} tasks/s, {100 * point['training_share']:.0f} % training, "
            f"{1000 * point['mean_forward_s']:g} ms, seed {point['seed']}",
            *(
                f"{100 * point['slo_attainment'][name]:.1f} %<small>{point['throughput_ratio'][name]:.2f}×</small>"
                for name in policies
            ),
        )
        for point in points
    ]
    return (
        "<h2>Points that overload every policy</h2><p>Attainment, and throughput over separate clusters below it.</p>"
        f"<details><summary>{count(len(points), 'point')}</summary>"
        f"{table(('point', *map(text, policies)), rows)}</details>"
    )
