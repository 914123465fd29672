"""The page, and the tables on the terminal. Pure."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bench.colocation.claims import limit, line
from bench.colocation.config import HALF
from bench.colocation.figures import DEFINITIONS
from bench.colocation.scenario import WORKLOAD
from bench.report.colors import policy_color
from bench.report.table import percent
from services.charts.page import chip, configuration, document, facts, notice, table, tile
from services.charts.svg import Chart, legend, text

#: Column -> how a row shows it.
_COLUMNS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "attainment": lambda row: percent(row["slo_attainment"]),
    "without training": lambda row: percent(row["slo_attainment_off"]),
    "harvest": lambda row: f"{row['harvest']:.2f}",
    "harvest, of most idle": lambda row: _known(row.get("harvest_of_most_idle")),
    "safe harvest": lambda row: f"{row['safe_harvest']:.2f}",
    "training kept": lambda row: "–" if row["training_kept"] is None else percent(row["training_kept"]),
    "trained tokens/s": lambda row: f"{row['trained_tokens_per_s']:,.0f}",
    "idle without training": lambda row: percent(row["idle_share_off"]),
}
_TIMES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "TTFT p50 / p99, ms": lambda row: _milliseconds(row["ttft_s"]),
    "TPOT p50 / p99, ms": lambda row: _milliseconds(row["tpot_s"]),
    "staleness p50 / p99, s": lambda row: _pair(row["staleness_s"], 1.0, ".1f"),
}
#: Header on a terminal of 80 columns -> column.
_SHORT = {
    "SLO kept": "attainment",
    "SLO alone": "without training",
    "harvest": "harvest",
    "of most idle": "harvest, of most idle",
    "safe harvest": "safe harvest",
    "training kept": "training kept",
}
#: What the columns mean, a line of a terminal each.
_MEANINGS = (
    "SLO kept: share of requests whose TTFT and TPOT were kept, training on",
    "SLO alone: the same without training",
    "harvest: training work done / stage time that serving alone leaves idle",
    "of most idle: the same, idle time of the policy that leaves most of it",
    "safe harvest: harvest x (SLO kept / SLO alone, max. 1); 0 if alone is overload",
    "training kept: trained tokens/s / those with nothing to serve, best policy",
)
#: Figure -> its axis.
_CHARTS = {
    "safe_harvest": "safe harvest, share of the stage time that serving leaves idle",
    "slo_attainment": "SLO attainment with training, share of requests",
    "training_kept": "training kept, share of the tokens/s with nothing to serve",
    "harvest_of_most_idle": "harvest, share of the idle time of the policy that leaves most",
}
_QUICK = "A quick run: too few and too short simulations for figures; nothing is decided."
#: Radius of the smallest ring and most that the largest is over it, pixels; width of the thinnest line.
_RING_PX, _MOST_OVER_PX, _LINE_PX = 3.0, 7.5, 2.0


def meanings(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of the tables on the terminal has to know, line by line."""
    quick = [_QUICK] if summary["config"]["is_quick"] else []
    half = f"half of capacity: {HALF * summary['capacity_rps']:.2f} requests/s, for every policy"
    return [*quick, *_MEANINGS, _capacity(summary), half]


def _capacity(summary: Mapping[str, Any]) -> str:
    best = max(summary["capacities"], key=lambda policy: summary["capacities"][policy]["rate"])
    return f"capacity, {summary['capacity_rps']:.2f} requests/s, of the best policy without training, {best}"


def terminal_tables(found: Mapping[str, Any]) -> list[Table]:
    """A table of rates and policies, and one of the cluster of two speeds."""
    rates = [
        (f"{row['rate']:.1f} {row['policy']}", *(_COLUMNS[name](row) for name in _SHORT.values()))
        for row in found["rates"]
    ]
    return [
        _terminal("Colocation", ("requests/s, policy", *_SHORT), rates),
        _terminal("Capacity without training", *_capacities(found)),
        _terminal("Two speeds: attainment", *_two_speeds(found)),
    ]


def render(summary: Mapping[str, Any]) -> str:
    """The page."""
    claims = summary["claims"]
    tiles = "".join(
        tile("–" if c["value"] is None else f"{c['value']:.2f}", c["text"], chip(c["verdict"], limit(c)))
        for c in claims
    )
    head = ("requests/s", "share", "policy")
    rows = [(f"{row['rate']:.2f}", f"{100 * row['share']:.0f} %", text(row["policy"])) for row in summary["rates"]]
    policies = list(dict.fromkeys(row["policy"] for row in summary["rates"]))
    keys = legend((policy, policy_color(policy)) for policy in policies)
    charts = "".join(
        f'<div class="figure">{_chart(summary["rates"], policies, figure, label)}</div>'
        for figure, label in _CHARTS.items()
    )
    return document(
        "LeMix: colocation",
        [
            _header(summary),
            notice("No verdicts", [_QUICK] if summary["config"]["is_quick"] else []),
            f"<h2>Definitions</h2>{facts(DEFINITIONS)}",
            f"<h2>Claims</h2><p>Half of capacity is half of the {text(_capacity(summary))}.</p>"
            f'<div class="tiles">{tiles}</div>',
            f"<h2>By rate</h2><p>Where policies have the same value, the line of the first is the "
            "broadest and its rings are the largest: the others show inside.</p>"
            f'{keys}<div class="pair">{charts}</div>',
            "<h2>Every rate and policy</h2><p>Rates with their shares of capacity.</p>"
            + "<br>".join(_table(head, rows, summary["rates"], columns) for columns in (_COLUMNS, _TIMES)),
            f"<h2>Capacity without training</h2>{table(*_capacities(summary))}",
            "<h2>Two speeds</h2><p>Half of the nodes are fast. Attainment with the coefficients of every node, and "
            f"with one mean set for all.</p>{table(*_two_speeds(summary))}",
            *_live(summary.get("live")),
            configuration(summary["config"]),
        ],
    )


def _header(summary: Mapping[str, Any]) -> str:
    slo, config = summary["slo"], summary["config"]
    promised = f"TTFT {1e3 * slo['ttft_s']:.0f} ms, TPOT {1e3 * slo['tpot_s']:.1f} ms"
    seeds = ", ".join(str(seed) for seed in config["seeds"])
    traffic = f"the trace {config['trace']}" if config["trace"] else f"the published statistics of {WORKLOAD}"
    return (
        "<h1>Training in what serving leaves</h1>"
        f"<p>{config['nodes']} nodes, in the simulator, with the production scheduler and node cores. Promised: "
        f"{promised}. Requests after {text(traffic)}, {config['seconds']:g} s of them a run; beside them a backlog of "
        f"training, {config['training']['batch']} x {config['training']['length']} tokens a micro-batch.</p>"
        f'<p class="soft">{text(summary["started_at"])} · {text(summary["machine"]["cpu"])}, '
        f"{summary['machine']['cores']} cores · commit {text(summary['git_commit'])} · seeds {seeds} · "
        f"{summary['seconds_total']:.0f} s</p>"
    )


def _live(live: Mapping[str, Any] | None) -> list[str]:
    """The runs on live clusters, beside the simulator's."""
    if live is None:
        return []
    rows = [(text(policy), source) for policy in live["policies"] for source in ("live", "simulated")]
    measured = [found[source] for found in live["policies"].values() for source in ("live", "simulated")]
    large = live["large"]
    return [
        "<h2>On a live emulated cluster</h2><p>All services are real, the stages take the time that the profile says, "
        f"{live['time_scale']:g} times as slow; {live['rate']:.2f} requests/s for {live['seconds']:.1f} s. Clock slip "
        f"p99 {percent(live['clock_slip_p99_frac'])} of an operation{_tried(live['clock_slip_by_scale'])}; "
        f"wake priority of the nodes: {text(live['wake_priority'])}.</p>",
        "<br>".join(_table(("policy", ""), rows, measured, columns) for columns in (_COLUMNS, _TIMES)),
        f"<p>{large['nodes']} nodes of {large['stages']} stages, {large['rate']:.1f} requests/s, "
        f"{large['time_scale']:g} times as slow (simulated): "
        f"attainment {percent(large['slo_attainment'])} ({percent(large['simulated']['slo_attainment'])}), "
        f"trained tokens/s {large['trained_tokens_per_s']:,.0f} ({large['simulated']['trained_tokens_per_s']:,.0f}), "
        f"clock slip p99 {percent(large['clock_slip_p99_frac'])}.</p>",
    ]


def _tried(slips: Mapping[str, float]) -> str:
    """What the time scales looked at gave."""
    found = ", ".join(f"{percent(slip)} at {scale} times" for scale, slip in slips.items())
    return f"; in short runs with training {found}" if found else ""


def claim_lines(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(verdict, words) of every claim."""
    return [(claim["verdict"], line(claim)) for claim in summary["claims"]]


def _two_speeds(found: Mapping[str, Any]) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    rows = [
        (
            f"{row['rate']:.1f}",
            "with" if row["trains"] else "without",
            percent(row["per_node"]),
            percent(row["averaged"]),
            f"{100 * (row['per_node'] - row['averaged']):+.1f}",
        )
        for row in found["heterogeneous"]["rates"]
    ]
    return ("requests/s", "training", "by node", "averaged", "points"), rows


def _capacities(found: Mapping[str, Any]) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    rows = [(text(name), f"{value['rate']:.2f}") for name, value in found["capacities"].items()]
    return ("policy", "requests/s"), rows


def _table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    measured: Sequence[Mapping[str, Any]],
    columns: Mapping[str, Callable[[Mapping[str, Any]], str]],
) -> str:
    """`columns` of what was measured, after the cells that say what it is."""
    cells = [[text(form(row)) for form in columns.values()] for row in measured]
    return table((*head, *columns), [(*row, *more) for row, more in zip(rows, cells, strict=True)])


def _known(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _milliseconds(pair: Mapping[str, float | None]) -> str:
    return _pair(pair, 1e3, ".0f")


def _pair(pair: Mapping[str, float | None], factor: float, form: str) -> str:
    return " / ".join("–" if pair[key] is None else format(factor * (pair[key] or 0.0), form) for key in ("p50", "p99"))


def _terminal(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    found = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    found.add_column(head[0], no_wrap=True)
    for name in head[1:]:
        found.add_column(name, justify="right", vertical="bottom")
    for row in rows:
        found.add_row(*row)
    return found


def _chart(rows: Sequence[Mapping[str, Any]], policies: Sequence[str], figure: str, label: str) -> str:
    highest = max(1.0, *(row[figure] for row in rows))
    chart = Chart.plot(540, 280, (0.0, 1.05 * max(row["rate"] for row in rows)), (0.0, 1.02 * highest))
    chart.axes("requests per second", label)
    for index, policy in enumerate(policies):
        points = [(row["rate"], row[figure]) for row in rows if row["policy"] == policy]
        _nested(chart, points, policy_color(policy), 1.0 - (index + 1) / len(policies))
    return chart.render(f"{label} by rate")


def _nested(chart: Chart, points: Sequence[tuple[float, float]], color: str, outer: float) -> None:
    """A line with rings. outer: 0 (drawn last) to 1; the larger the broader, to be seen around those drawn later."""
    over_px = outer * _MOST_OVER_PX
    places = [(chart.x(x), chart.y(y)) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    style = f"fill:none;stroke:{color};stroke-width"
    chart.parts.append(f'<polyline class="line" style="{style}:{_LINE_PX + over_px:.1f}" points="{path}"/>')
    chart.parts += [
        f'<circle style="{style}:{_LINE_PX}" cx="{x:.1f}" cy="{y:.1f}" r="{_RING_PX + over_px:.1f}"/>'
        for x, y in places
    ]
