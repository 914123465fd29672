"""Lengths that spread less and more, and in other orders than at random."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.paper.charts import Panel, Series, panels
from bench.paper.config import BASELINE, SUBJECT, PaperConfig
from bench.paper.family import Family, Labelled, Row, Shown
from bench.paper.traffic import LENGTHS, Lengths, spread_lengths
from bench.paper.variants import captioned, compared, everywhere, size
from bench.report.colors import policy_color
from bench.report.table import percent
from services.charts.svg import legend

NAME = "heterogeneity"
POLICIES = (BASELINE, "round_robin", "paper_additive", SUBJECT)
SPREADS = (0.25, 0.5, 1.0, 2.0)
ORDERS = ("ascending", "descending", "bursty")


def conditions() -> dict[str, Lengths]:
    """Name -> lengths. A spread is a multiple of the grid's standard deviation; the mean work stays the same."""
    spreads = {f"spread {factor:g}×": LENGTHS if factor == 1.0 else spread_lengths(factor) for factor in SPREADS}
    return spreads | {order: Lengths(LENGTHS.shape, order) for order in ORDERS}


def runs(config: PaperConfig) -> list[Labelled]:
    """Every policy under every condition."""
    points, seeds, num_tasks = config.axis_points(), config.first_seed, config.few_tasks
    return [
        labelled
        for name, lengths in conditions().items()
        for policy in POLICIES
        for labelled in everywhere(f"{policy}, {name}", points, seeds, num_tasks, policy, lengths=lengths)
    ]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Condition -> the comparison with separate clusters under it."""
    found: dict[str, Any] = {}
    for name in conditions():
        under = [{**row, "label": row["policy"]} for row in rows if row["label"] == f"{row['policy']}, {name}"]
        found[name], _ = compared(under)
    return {NAME: found}


def tables(summary: Mapping[str, Any]) -> list[Shown]:
    """Throughput ratio and attainment, a row per condition."""
    found = summary[NAME]
    others = [policy for policy in POLICIES if policy != BASELINE]
    ratios, kept = [], []
    for name, under in found.items():
        policies = under["policies"]
        ratios.append((name, *(f"{policies[policy]['throughput_ratio']['geomean']:.2f}" for policy in others)))
        kept.append((name, *(percent(policies[policy]["attainment_mean"]) for policy in POLICIES)))
    about = size(next(iter(found.values())))
    return [
        Shown(f"Lengths: throughput over separate clusters · {about}", ("", *others), ratios),
        Shown(f"Lengths: SLO attainment · {about}", ("", *POLICIES), kept),
    ]


def sections(config: PaperConfig, summary: Mapping[str, Any]) -> list[str]:
    """Throughput and attainment by condition."""
    del config
    names = [name.removeprefix("spread ") for name in summary[NAME]]
    items = [
        _panel(
            "throughput over separate clusters", summary[NAME], ("throughput_ratio", "geomean"), names, "{:g}×".format
        ),
        _panel("SLO attainment", summary[NAME], ("attainment_mean",), names, "{:.0%}".format),
    ]
    shown = tables(summary)
    keys = legend((policy, policy_color(policy)) for policy in POLICIES)
    return [
        "<h2>Length heterogeneity</h2><p>First the standard deviation of the lengths as a multiple of the grid’s, with "
        "the same mean work; then the grid’s lengths in other orders: rising, falling, in runs of similar length. "
        f'{size(next(iter(summary[NAME].values())))}.</p>{keys}<div class="figure">'
        f"{panels(items, 'By lengths', columns=2)}</div>{''.join(map(captioned, shown))}"
    ]


def _panel(
    title: str,
    found: Mapping[str, Any],
    path: tuple[str, ...],
    names: Sequence[str],
    form: Callable[[float], str],
) -> Panel:
    series = []
    for policy in POLICIES:
        points = []
        for index, under in enumerate(found.values()):
            middle, extent = under["policies"][policy], under["spread"][policy]
            for key in path:
                middle, extent = middle[key], extent[key]
            points.append((float(index), extent[0], middle, extent[1]))
        series.append(Series(policy, policy_color(policy), points))
    return Panel(title, "lengths", series, form, names)


HETEROGENEITY = Family(NAME, runs, summarise, tables, sections)
