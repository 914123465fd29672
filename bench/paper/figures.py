"""The charts of the grid."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.paper.compare import Place, all_overloaded, by_seed
from bench.paper.config import BASELINE
from bench.paper.outcome import Details
from bench.paper.scenario import NODES, Point
from bench.report.colors import policy_color
from services.charts.svg import Chart, Scale, number

_WIDTH = 1060
_Value = Callable[[Mapping[str, Mapping[str, Any]], str], float]


@dataclass(frozen=True, slots=True)
class Grid:
    """Rows by place, one mapping of policies per seed."""

    policies: list[str]
    rates: list[float]
    shares: list[float]
    forwards_s: list[float]
    points: dict[Place, list[Mapping[str, Mapping[str, Any]]]]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> "Grid":
        """From the rows of the summary."""
        points: dict[Place, list[Mapping[str, Mapping[str, Any]]]] = {}
        for places in by_seed(rows).values():
            for where, policies in places.items():
                points.setdefault(where, []).append(policies)
        rates, shares, forwards_s = (sorted({where[axis] for where in points}) for axis in range(3))
        return cls(list(dict.fromkeys(row["policy"] for row in rows)), rates, shares, forwards_s, points)

    def over_seeds(self, where: Place, policy: str, value: _Value) -> list[float]:
        """The value of every seed, sorted."""
        return sorted(value(seed, policy) for seed in self.points[where])

    def is_overloaded(self, where: Place) -> bool:
        """Whether most seeds overload every policy there."""
        seeds = self.points[where]
        return 2 * sum(map(all_overloaded, seeds)) > len(seeds)


def _throughput_ratio(point: Mapping[str, Mapping[str, Any]], policy: str) -> float:
    return float(point[policy]["tasks_per_held_node_s"] / point[BASELINE]["tasks_per_held_node_s"])


def _attainment(point: Mapping[str, Mapping[str, Any]], policy: str) -> float:
    return float(point[policy]["slo_attainment"])


def _attainment_points(point: Mapping[str, Mapping[str, Any]], policy: str) -> float:
    return 100.0 * (_attainment(point, policy) - _attainment(point, BASELINE))


# ------------------------------------------------------------- panels over the rate


def throughput_over_rate(grid: Grid) -> str:
    """Ratio to separate clusters."""
    return _panels(grid, _throughput_ratio, "Throughput over that of separate clusters, by request rate", percent=False)


def attainment_over_rate(grid: Grid) -> str:
    """Share of promises kept."""
    return _panels(grid, _attainment, "SLO attainment by request rate", percent=True)


def _panels(grid: Grid, value: _Value, title: str, *, percent: bool) -> str:
    """One panel per mean forward (rows) and training share (columns), all with the same axes."""
    left, top, gap, height = 96, 26, 14, 132
    width = (_WIDTH - left - 8) / len(grid.shares) - gap
    high = 1.0
    if not percent:
        high = max(value(seed, name) for seeds in grid.points.values() for seed in seeds for name in grid.policies)
    bottom = top + len(grid.forwards_s) * (height + gap)
    canvas = Chart(_WIDTH, bottom + 40, Scale(0, 1, 0, 1), Scale(0, 1, 0, 1))
    for row, forward_s in enumerate(grid.forwards_s):
        low_px = top + row * (height + gap) + height
        canvas.label(4, low_px - height / 2 + 4, f"{1000 * forward_s:g} ms", css="name strong")
        for column, share in enumerate(grid.shares):
            from_px = left + column * (width + gap)
            panel = Chart(
                _WIDTH,
                bottom,
                Scale(0.0, 1.06 * grid.rates[-1], from_px, from_px + width),
                Scale(0.0, 1.05 * high, low_px, low_px - height),
            )
            _panel(panel, grid, (share, forward_s), value, percent=percent, with_labels=column == 0)
            if row == 0:
                panel.label(from_px + width / 2, top - 9, f"{100 * share:g} % training", anchor="middle", css="name")
            if row == len(grid.forwards_s) - 1:
                for rate in grid.rates:
                    panel.label(panel.x(rate), low_px + 15, number(rate), anchor="middle")
            canvas.parts += panel.parts
    canvas.label(left + (_WIDTH - left) / 2, bottom + 26, "tasks per second", anchor="middle", css="name")
    return canvas.render(title)


def _panel(
    panel: Chart, grid: Grid, where: tuple[float, float], value: _Value, *, percent: bool, with_labels: bool
) -> None:
    share, forward_s = where
    for tick in panel.y.ticks(5 if not percent else 2):
        panel.rule(tick, strong=tick == 1.0 and not percent)
        if with_labels:
            label = f"{100 * tick:.0f} %" if percent else f"{tick:g}×"
            panel.label(panel.x.from_px - 6, panel.y(tick) + 4, label, anchor="end")
    for name in grid.policies:
        seeds = [(rate, grid.over_seeds((rate, share, forward_s), name, value)) for rate in grid.rates]
        panel.area([(rate, values[0], values[-1]) for rate, values in seeds], policy_color(name))
        panel.line([(rate, statistics.median(values)) for rate, values in seeds], policy_color(name))


# ------------------------------------------------------------- heat maps


def heat_maps(grid: Grid, policy: str) -> str:
    """Throughput ratio and attainment difference to separate clusters, a map per mean forward."""
    left, cell_px, row_gap, gap = 96, 30, 44, 26
    width = (_WIDTH - left - gap * (len(grid.forwards_s) - 1)) / len(grid.forwards_s)
    height = cell_px * len(grid.shares)
    kinds: tuple[tuple[str, _Value, Callable[[float], str], Callable[[float], float]], ...] = (
        ("throughput", _throughput_ratio, "{:.2f}".format, lambda ratio: math.log2(ratio) / math.log2(3.0)),
        ("attainment", _attainment_points, "{:+.0f}".format, lambda points: points / 50.0),
    )
    chart = Chart(_WIDTH, 2 * (height + row_gap) + 14, Scale(0, 1, 0, 1), Scale(0, 1, 0, 1))
    for row, (name, value, form, strength) in enumerate(kinds):
        top = 28 + row * (height + row_gap)
        chart.label(4, top - 8, name, css="name strong")
        for index, share in enumerate(grid.shares):
            chart.label(left - 8, top + index * cell_px + 20, f"{100 * share:g} %", anchor="end")
        for column, forward_s in enumerate(grid.forwards_s):
            from_px = left + column * (width + gap)
            chart.label(from_px + width / 2, top - 8, f"mean forward {1000 * forward_s:g} ms", anchor="middle")
            _heat_map(
                chart, grid, policy, forward_s, (from_px, top, width / len(grid.rates), cell_px), value, form, strength
            )
    return chart.render(f"{policy} against separate clusters, by rate, training share and mean forward")


def _heat_map(
    chart: Chart,
    grid: Grid,
    policy: str,
    forward_s: float,
    box: tuple[float, float, float, float],
    value: _Value,
    form: Callable[[float], str],
    strength: Callable[[float], float],
) -> None:
    left, top, width, height = box
    for column, rate in enumerate(grid.rates):
        at = left + column * width
        for row, share in enumerate(grid.shares):
            where = (rate, share, forward_s)
            middle = statistics.median(grid.over_seeds(where, policy, value))
            chart.cell(at, top + row * height, width - 2, height - 2, form(middle), strength(middle),
                       faded=grid.is_overloaded(where))  # fmt: skip
        chart.label(at + width / 2, top + len(grid.shares) * height + 13, f"{rate:g}/s", anchor="middle")


# ------------------------------------------------------------- efficiency


def efficiency(grid: Grid) -> str:
    """One dot per policy and point, by the load."""
    loads = {where: Point(*where).load_nodes for where in grid.points}
    low, high = min(loads.values()), max(loads.values())
    chart = Chart.plot(_WIDTH, 340, (0.9 * low, 1.1 * high), (0.0, 1.0), log_x=True)
    chart.axes("offered load, nodes kept busy (log scale)", "efficiency", y_percent=True)
    if low < NODES < high:
        chart.marker(NODES, f"all {NODES} nodes", low=True)
    for name in grid.policies:
        dots = []
        for where, load in loads.items():
            known = [seed[name]["efficiency"] for seed in grid.points[where] if seed[name]["efficiency"] is not None]
            if known:
                dots.append((load, statistics.median(known)))
        chart.dots(dots, policy_color(name))
    return chart.render("Efficiency of every policy at every point, by offered load")


# ------------------------------------------------------------- one point


def nodes_held(runs: Sequence[Details]) -> str:
    """How many nodes each policy holds, over time."""
    height, gap, left = 58, 22, 150
    until_s = max(end_s for run in runs for held in run.held.values() for _, end_s in held)
    body = len(runs) * (height + gap)
    x = Scale(0.0, until_s, left, _WIDTH - 12)
    canvas = Chart(_WIDTH, body + 44, x, Scale(0.0, 1.0, body, 0))
    for index, run in enumerate(runs):
        top = gap + index * (height + gap)
        panel = Chart(_WIDTH, body, x, Scale(0.0, NODES, top + height, top))
        steps = _steps(held for node in run.held.values() for held in node)
        held_s = sum(end_s - begin_s for node in run.held.values() for begin_s, end_s in node)
        panel.label(2, top + 20, run.policy, css="name strong")
        panel.label(2, top + 38, f"{held_s:,.0f} node-s")
        for count in (0, NODES // 2, NODES):
            panel.rule(count)
            panel.label(left - 6, panel.y(count) + 4, str(count), anchor="end")
        panel.area([(at_s, 0.0, count) for at_s, count in steps], policy_color(run.policy))
        panel.line(steps, policy_color(run.policy))
        canvas.parts += panel.parts
    for value in x.ticks(10):
        canvas.label(x(value), body + 18, f"{value:g}", anchor="middle")
    canvas.marker(runs[0].last_arrival_s, "last arrival")
    canvas.label((left + _WIDTH) / 2, body + 38, "time, s", anchor="middle", css="name")
    return canvas.render("Number of nodes held over time, per policy")


def _steps(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of the number of intervals that are open, over time."""
    changes: dict[float, int] = {}
    for begin_s, end_s in intervals:
        changes[begin_s] = changes.get(begin_s, 0) + 1
        changes[end_s] = changes.get(end_s, 0) - 1
    count = 0
    corners: list[tuple[float, float]] = []
    for at_s in sorted(changes):
        corners += [(at_s, count), (at_s, count + changes[at_s])]
        count += changes[at_s]
    return corners


def response_cdf(runs: Sequence[Details]) -> str:
    """Share of all requests answered within a time."""
    times = [at_s for run in runs for at_s in run.responses_s if math.isfinite(at_s)]
    slo_s = runs[0].slo_s
    low = max(0.01 * slo_s, 0.8 * min([*times, slo_s]))
    chart = Chart.plot(_WIDTH, 320, (low, 1.2 * max([*times, slo_s])), (0.0, 1.0), log_x=True)
    chart.axes("response, s (log scale)", "requests", y_percent=True)
    chart.marker(slo_s, f"promise {slo_s:g} s", low=True)
    for run in runs:
        count = len(run.responses_s)
        points = [(at_s, (index + 1) / count) for index, at_s in enumerate(run.responses_s) if math.isfinite(at_s)]
        chart.line(points, policy_color(run.policy))
    return chart.render("Cumulative distribution of the response time per policy")
