"""Two ways to predict a request's first token: by arithmetic, or by running the node's core ahead."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bench.paper.claims import judged
from bench.paper.compare import place
from bench.paper.config import BASELINE, SUBJECT, PaperConfig
from bench.paper.family import Family, Labelled, Row, Shown
from bench.paper.prediction import ttft_errors
from bench.paper.scenario import DECODE, PREFILL, Run
from bench.paper.series import geomean, grouped, over_seeds
from bench.paper.variants import captioned, everywhere
from bench.report.table import percent
from services.simulator.types import SimulationResult

NAME = "forecast"
ANALYTIC, AHEAD = "analytic", "fast_forward"
_MODES = (PREFILL, DECODE)


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
        found += everywhere(BASELINE, points, seeds, num_tasks, BASELINE, mode=mode)
        for label in (ANALYTIC, AHEAD):
            options = () if label == ANALYTIC else ((NAME, label),)
            found += everywhere(label, points, seeds, num_tasks, SUBJECT, options=options, mode=mode, also=figures)
    return found


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
    baseline = {(row["mode"], row["seed"], place(row)): row for row in rows if row["label"] == BASELINE}
    by_seed = {
        key: _figures(group, baseline)
        for key, group in grouped(rows, lambda row: (row["mode"], row["label"], row["seed"])).items()
        if key[1] != BASELINE
    }
    cells = [
        {"mode": mode, "label": label}
        | {c.key: over_seeds(v[c.key] for k, v in by_seed.items() if k[:2] == (mode, label)) for c in _COLUMNS}
        for mode in _MODES
        for label in (ANALYTIC, AHEAD)
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
            figures[error] / by_seed[mode, ANALYTIC, seed][error]
            for (where, label, seed), figures in by_seed.items()
            if (where, label) == (mode, AHEAD)
        ],
        0.5,
        "{:.2f}×",
        at_least=False,
    )


def tables(summary: Mapping[str, Any]) -> list[Shown]:
    """A row per mode and way to predict: medians over the seeds."""
    found = summary[NAME]
    rows = [
        (row["mode"], row["label"], *(column.form(row[column.key]["median"]) for column in _COLUMNS))
        for row in found["rows"]
    ]
    title = (
        f"Forecast · {found['points']} points, seeds: {found['seeds']}, up to {found['tasks_per_point']:,} tasks per "
        "point"
    )
    return [Shown(title, ("", "", *(column.title for column in _COLUMNS)), rows)]


def sections(config: PaperConfig, summary: Mapping[str, Any]) -> list[str]:
    """The table."""
    del config
    (shown,) = tables(summary)
    return [
        "<h2>Forecast</h2><p>lemix predicts a request's first token by arithmetic from what a node holds "
        "(<i>analytic</i>), or by running a copy of the node's core ahead (<i>fast_forward</i>). The error, mean and "
        "median, is that of the time predicted at placement, as a share of what it came to; throughput is tasks per "
        "held node-second over separate clusters. The time of a decision is in the decision benchmark.</p>"
        + captioned(shown)
    ]


FORECAST = Family(NAME, runs, summarise, tables, sections)
