"""Do LeMix's knobs do what they promise? Rank correlation of a knob with what it is to move, per seed."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scipy.stats import spearmanr

from bench.paper.charts import Panel, Series, panels
from bench.paper.claims import judged
from bench.paper.config import SUBJECT, PaperConfig
from bench.paper.family import Family, Labelled, Row, Shown
from bench.paper.knobs import CONSISTENCY, OPEN_AT, Knob
from bench.paper.series import geomean, grouped, over_seeds
from bench.paper.variants import everywhere, html, size
from bench.report.colors import policy_color
from services.charts.svg import text

NAME = "trends"
GOAL = 0.8
#: Options a knob is turned on top of. Consistency chooses among the nodes in use. While those are as few as possible,
#: how evenly requests are spread says which nodes were opened, so its trends are looked at with all of them in use.
_ON_TOP_OF = {CONSISTENCY: (("open_at", 0.0), ("slo_fraction", 0.0))}


class Trend(NamedTuple):
    """Raising the knob is to raise (sign 1) or lower (-1) a figure of the rows."""

    knob: Knob
    metric: str
    title: str
    sign: int


TRENDS = (
    Trend(OPEN_AT, "tasks_per_held_node_s", "tasks per held node-second", 1),
    Trend(OPEN_AT, "mean_response_s", "mean response, s", 1),
    Trend(CONSISTENCY, "length_variance_within", "length variance within nodes", -1),
    Trend(CONSISTENCY, "load_skew", "skew of requests over nodes", 1),
)


def runs(config: PaperConfig) -> list[Labelled]:
    """LeMix at every value of the knobs."""
    points, seeds, num_tasks = config.axis_points(), config.seeds, config.num_tasks
    return [
        labelled
        for knob in dict.fromkeys(trend.knob for trend in TRENDS)
        for value in knob.values
        for labelled in everywhere(
            _label(knob, value), points, seeds, num_tasks, SUBJECT, options=_options(knob, value)
        )
    ]


def _options(knob: Knob, value: float) -> tuple[tuple[str, float], ...]:
    return (*_ON_TOP_OF.get(knob, ()), *knob.options(value))


def _label(knob: Knob, value: float) -> str:
    return f"{SUBJECT}, {knob.name}={value:g}"


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Every trend: its figure at every value and seed, all points together, and the correlations."""
    by_run = grouped(rows, lambda row: (row["label"], row["seed"]))
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    found = []
    for trend in TRENDS:
        values = trend.knob.values
        figures = [[_figure(by_run[_label(trend.knob, value), seed], trend) for value in values] for seed in seeds]
        found.append(
            {
                "knob": trend.knob.name,
                "metric": trend.metric,
                "title": trend.title,
                "expected": trend.sign,
                "values": list(values),
                "figures": [over_seeds(column) for column in zip(*figures, strict=True)],
                "rho": [correlation(values, one) for one in figures],
            }
        )
    tasks = max(row["n_tasks"] for row in rows)
    points = len({(row["rate"], row["training_share"]) for row in rows})
    about = {"seeds": len(seeds), "points": points, "tasks_per_point": tasks}
    return {NAME: {**about, "trends": found}, "claims": [_claim(item) for item in found]}


def _figure(rows: Sequence[Row], trend: Trend) -> float:
    values = [row[trend.metric] for row in rows]
    return geomean(values) if trend.knob is OPEN_AT else statistics.fmean(values)


def correlation(values: Sequence[float], figures: Sequence[float]) -> float:
    """Spearman's rho; 0 when nothing moves."""
    return 0.0 if len(set(figures)) == 1 else float(spearmanr(values, figures).statistic)


def _claim(item: Mapping[str, Any]) -> dict[str, Any]:
    direction = "raises" if item["expected"] > 0 else "lowers"
    return judged(
        f"trend_{item['knob']}_{item['metric']}",
        f"lemix: {item['knob']} {direction} {item['title'].removesuffix(', s')}, rank correlation",
        f"{NAME}.{item['knob']}.{item['metric']}",
        [item["expected"] * rho + 0.0 for rho in item["rho"]],
        GOAL,
        "{:.2f}",
    )


def tables(summary: Mapping[str, Any]) -> list[Shown]:
    """A row per trend."""
    found = summary[NAME]
    rows = []
    for item in found["trends"]:
        first, last = (f"{item['figures'][end]['median']:.3g}" for end in (0, -1))
        wanted = "up" if item["expected"] > 0 else "down"
        rhos = f"{min(item['rho']):+.2f} – {max(item['rho']):+.2f}"
        rows.append((item["title"], item["knob"], f"{first} → {last}", wanted, rhos))
    title = f"Trends of lemix · {size(found)}"
    return [Shown(title, ("figure", "knob", "first → last", "wanted", "rho of seeds"), rows)]


def sections(config: PaperConfig, summary: Mapping[str, Any]) -> list[str]:
    """A panel per trend."""
    del config
    items = []
    for item in summary[NAME]["trends"]:
        points = [
            (float(index), figure["low"], figure["median"], figure["high"])
            for index, figure in enumerate(item["figures"])
        ]
        low, high = min(p[1] for p in points), max(p[3] for p in points)
        room = 0.1 * (high - low) or 0.1 * high or 1.0
        names = [f"{value:g}" for value in item["values"]]
        series = [Series(SUBJECT, policy_color(SUBJECT), points)]
        items.append(
            Panel(item["title"], item["knob"], series, names=names, limits=(max(0.0, low - room), high + room))
        )
    (shown,) = tables(summary)
    return [
        "<h2>Trends</h2><p>What turning a knob of lemix does, all points together; bands reach from the smallest to "
        f"the largest seed. A trend holds with a rank correlation of at least {GOAL:g} in the expected direction. The "
        "trends of consistency are those with all nodes in use: how evenly fewer nodes share the requests is a matter "
        "of which were opened. "
        f'{text(shown.title)}.</p><div class="figure">{panels(items, "Trends of lemix", columns=2)}</div>{html(shown)}'
    ]


TRENDS_FAMILY = Family(NAME, runs, summarise, tables, sections)
