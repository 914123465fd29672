"""What is possible with promises, on the terminal and on the page."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.paper.config import SUBJECT
from bench.paper.family import Shown
from bench.paper.limits import KEY
from bench.paper.scenario import Point
from bench.paper.series import over_seeds
from bench.paper.variants import count, html
from bench.report.colors import policy_color
from bench.report.table import two, whole
from services.charts.page import table
from services.charts.svg import Chart, legend, text

#: Figures of a point and their heads.
_SHARES = {
    "efficiency": "least possible / held",
    "promised_efficiency": "least with as many promises kept / held",
    "possible_efficiency": "least possible / least within the other claims",
}
_NODE_S = {
    "held_node_s": f"held by {SUBJECT}",
    "promised_node_s": "least with as many promises kept",
    "possible_node_s": "least within the other claims",
}
_COLORS = dict(zip(_NODE_S, (policy_color(SUBJECT), "#d3622a", "#1b9e77"), strict=True))


def tables(summary: Mapping[str, Any]) -> list[Shown]:
    """The shares of all points together; nothing without bounds."""
    found = summary.get(KEY)
    if found is None:
        return []
    rows = []
    for name, title in _SHARES.items():
        middle = over_seeds(found[name]) or {}
        each = over_seeds(point[name] for point in found["points"]) or {}
        values = (middle.get("median"), each.get("low"), each.get("high"))
        rows.append((title, *("–" if value is None else two(value) for value in values)))
    points = len(found["points"])
    title = f"What is possible with promises · {count(points, 'point')}, {count(len(found['seeds']), 'seed')}"
    return [Shown(title, ("node time", "geomean", "smallest", "largest"), rows)]


def section(summary: Mapping[str, Any]) -> str:
    """Words, table, chart, and a row per point."""
    if KEY not in summary:
        return ""
    points = summary[KEY]["points"]
    (shown,) = tables(summary)
    keys = legend((title, _COLORS[name]) for name, title in _NODE_S.items())
    return (
        "<h2>What is possible with promises</h2><p>Two more bounds on the held node time. <i>As many promises "
        f"kept</i>: of any policy that keeps as many promises as {SUBJECT} did, is never later with a response and "
        "ends no later. <i>Within the other claims</i>: of any that is within the claims on attainment, end of the "
        "last task and worst response. Both know all arrivals and lengths in advance, and let a task run in pieces and "
        f"on several nodes at once, so what they allow need not be reachable. {text(shown.title)}.</p>"
        f"{html(shown)}{keys}"
        f'<div class="figure">{_chart(points)}</div>'
        f"<details><summary>{count(len(points), 'point')}</summary>{_every_point(points)}</details>"
    )


def _every_point(points: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            f"{point['rate']:g} tasks/s, {100 * point['training_share']:.0f} % training, "
            f"{1000 * point['mean_forward_s']:g} ms, seed {point['seed']}",
            *("–" if point[name] is None else whole(point[name]) for name in ("clairvoyant_node_s", *_NODE_S)),
            *("–" if point[name] is None else two(point[name]) for name in _SHARES),
        )
        for point in points
    ]
    return table(("node-seconds", "least possible", *_NODE_S.values(), *_SHARES.values()), rows)


def _chart(points: Sequence[Mapping[str, Any]]) -> str:
    """In multiples of the clairvoyant bound, by the load."""
    loads = [Point(point["rate"], point["training_share"], point["mean_forward_s"]).load_nodes for point in points]
    dots = {
        name: [
            (load, point[name] / point["clairvoyant_node_s"])
            for load, point in zip(loads, points, strict=True)
            if point[name] is not None
        ]
        for name in _NODE_S
    }
    highest = max(ratio for found in dots.values() for _, ratio in found)
    chart = Chart.plot(1060, 320, (0.9 * min(loads), 1.1 * max(loads)), (0.95, 1.05 * highest), log_x=True)
    chart.axes("offered load, nodes kept busy (log scale)", "node time / least possible")
    for name, found in dots.items():
        chart.dots(found, _COLORS[name])
    return chart.render("Node time held, and possible with promises, over the clairvoyant bound at every point")
