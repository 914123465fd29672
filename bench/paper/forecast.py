"""Two ways to predict a request's first token: by arithmetic, or by running the node's core ahead."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bench.paper.charts import Bar, BarColumn, bars
from bench.paper.claims import judged
from bench.paper.compare import place
from bench.paper.config import BASELINE, SUBJECT, PaperConfig
from bench.paper.family import Family, Labelled, Row, Shown
from bench.paper.prediction import ttft_errors
from bench.paper.scenario import DECODE, PREFILL, Run
from bench.paper.series import geomean, grouped, over_seeds
from bench.paper.variants import captioned, everywhere
from bench.report.colors import policy_color
from bench.report.table import percent
from services.simulator.types import SimulationResult

NAME = "forecast"
_WAYS = ANALYTIC, AHEAD = ("analytic", "fast_forward")
_MODES = (PREFILL, DECODE)
_COLORS = ("#888888", policy_color(SUBJECT))


class _Column(NamedTuple):
    title: str
    key: str
    form: Callable[[float], str]


_COLUMNS = (
    _Column("error", "ttft_error_mean", "{:.1%}".format),
    _Column("median", "ttft_error_median", "{:.2%}".format),
    _Column("SLO", "attainment", percent),
    _Column("over separate", "throughput_ratio", "{:.2f}×".format),
)


def runs(config: PaperConfig) -> list[Labelled]:
    """LeMix with both, and separate clusters, with and without decoding."""
    points, seeds, num_tasks = config.axis_points(), config.first_seed, config.few_tasks
    found: list[Labelled] = []
    for mode in _MODES:
        found += everywhere(_label(mode, BASELINE), points, seeds, num_tasks, BASELINE, mode=mode)
        for way in _WAYS:
            options = () if way == ANALYTIC else ((NAME, way),)
            found += everywhere(
                _label(mode, way), points, seeds, num_tasks, SUBJECT, options=options, mode=mode, also=figures
            )
    return found


def _label(mode: str, way: str) -> str:
    return f"{mode}, {way}"


def figures(run: Run, result: SimulationResult) -> dict[str, Any]:
    """Mean and median error of the predicted times to first token; None without any."""
    del run
    errors = ttft_errors(result)
    return {
        "ttft_error_mean": statistics.fmean(errors) if errors else None,
        "ttft_error_median": statistics.median(errors) if errors else None,
    }


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Means over the points, by mode, way to predict and seed."""
    baseline = {(row["mode"], row["seed"], place(row)): row for row in rows if row["policy"] == BASELINE}
    by_seed = {
        key: _figures(group, baseline)
        for key, group in grouped(rows, lambda row: (row["label"], row["seed"])).items()
        if group[0]["policy"] != BASELINE
    }
    cells = [
        {"label": label} | {c.key: over_seeds(v[c.key] for k, v in by_seed.items() if k[0] == label) for c in _COLUMNS}
        for label in dict.fromkeys(label for label, _ in by_seed)
    ]
    found = {
        "seeds": len({row["seed"] for row in rows}),
        "points": len({place(row) for row in rows}),
        "tasks_per_point": max(row["n_tasks"] for row in rows),
        "rows": cells,
    }
    return {NAME: found, "claims": [_claim(mode, by_seed) for mode in _MODES]}


def _figures(rows: Sequence[Row], baseline: Mapping[Any, Row]) -> dict[str, float]:
    def mean(key: str) -> float:
        return statistics.fmean(row[key] for row in rows if row[key] is not None)

    ratios = [
        row["tasks_per_held_node_s"] / baseline[row["mode"], row["seed"], place(row)]["tasks_per_held_node_s"]
        for row in rows
    ]
    return {
        "ttft_error_mean": mean("ttft_error_mean"),
        "ttft_error_median": mean("ttft_error_median"),
        "attainment": mean("slo_attainment"),
        "throughput_ratio": geomean(ratios),
    }


def _claim(mode: str, by_seed: Mapping[Any, Mapping[str, float]]) -> dict[str, Any]:
    error = "ttft_error_mean"
    return judged(
        f"forecast_error_{mode}",
        f"lemix, {mode}: mean error of the predicted TTFT, running nodes ahead over arithmetic",
        f"{NAME}.{error}",
        [
            found[error] / by_seed[_label(mode, ANALYTIC), seed][error]
            for (label, seed), found in by_seed.items()
            if label == _label(mode, AHEAD)
        ],
        0.5,
        "{:.2f}×",
        at_least=False,
    )


def tables(summary: Mapping[str, Any]) -> list[Shown]:
    """A row per mode and way to predict: medians over the seeds."""
    found = summary[NAME]
    rows = [(row["label"], *(column.form(row[column.key]["median"]) for column in _COLUMNS)) for row in found["rows"]]
    title = (
        f"Forecast · {found['points']} points, seeds: {found['seeds']}, up to {found['tasks_per_point']:,} tasks per "
        "point"
    )
    return [Shown(title, ("", *(column.title for column in _COLUMNS)), rows)]


def sections(config: PaperConfig, summary: Mapping[str, Any]) -> list[str]:
    """The table."""
    del config
    (shown,) = tables(summary)
    rows = summary[NAME]["rows"]
    columns = [
        BarColumn(title, [_bar(row[key]) for row in rows], form, strong=strong)
        for title, key, form, strong in (
            ("mean error of the predicted TTFT", "ttft_error_mean", "{:.1%}".format, None),
            ("SLO attainment", "attainment", "{:.1%}".format, None),
            ("throughput over separate clusters", "throughput_ratio", "{:.2f}×".format, 1.0),
        )
    ]
    labels = [(row["label"], _COLORS[row["label"].endswith(AHEAD)]) for row in rows]
    return [
        "<h2>Forecast</h2><p>lemix predicts a request's first token by arithmetic from what a node holds "
        "(<i>analytic</i>), or by running a copy of the node's core ahead (<i>fast_forward</i>). The error, mean and "
        "median, is that of the time predicted at placement, as a share of what it came to; throughput is tasks per "
        "held node-second over separate clusters. The time of a decision is in the decision benchmark.</p>"
        f'<div class="figure">{bars(labels, columns, "Forecast: error, attainment, throughput")}</div>'
        + captioned(shown)
    ]


def _bar(value: Mapping[str, float]) -> Bar:
    return Bar(value["low"], value["median"], value["high"])


FORECAST = Family(NAME, runs, summarise, tables, sections)
