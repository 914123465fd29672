"""Page of the decision benchmark: how the time of a decision grows with load, cluster and history. Pure."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.report.colors import policy_color
from services.charts import page, svg

Row = Mapping[str, Any]


def render(summary: Mapping[str, Any], sweeps: Sequence[tuple[str, str, Callable[[Row], bool]]]) -> str:
    """The page; sweeps: what is on the x axis, the row's key for it, and which rows belong to the sweep."""
    rows: list[Row] = summary["scheduler"]
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    charts = "".join(_chart(label, key, [row for row in rows if chosen(row)]) for label, key, chosen in sweeps)
    return page.document(
        "LeMix: time of a scheduling decision",
        [
            "<h1>Time of a scheduling decision</h1>",
            "<p>Median over all repetitions. One arriving request, from the event to the node it goes to. "
            "Committed: live requests; finished: tasks that ended before.</p>",
            svg.legend([(name, policy_color(name)) for name in policies]),
            f'<div class="figure">{charts}</div>',
            "<h2>Targets</h2>",
            page.table(_TARGET_HEAD, [_target(target) for target in summary["targets"]]),
            "<h2>Every point</h2>",
            page.table(_HEAD, [_cells(row) for row in rows]),
            page.facts({"machine": summary["machine"]["cpu"], "commit": summary["git_commit"]}),
            page.configuration(summary["config"]),
        ],
    )


#: Top, right, bottom, left, pixels: the last label of the x axis is centred on its end.
_MARGINS = (26, 28, 40, 52)
_HEAD = ("policy", "nodes", "committed", "finished", "p50, µs", "smallest to largest median, µs", "p99, µs")
_TARGET_HEAD = ("nodes", "committed", "slowest policy p50, µs", "slowest p99, µs", "")


def _cells(row: Row) -> list[str]:
    spread = f"{row['p50_us_min']:.1f} to {row['p50_us_max']:.1f}"
    numbers = [f"{row[key]:,}" for key in ("nodes", "committed", "finished")]
    return [svg.text(row["policy"]), *numbers, f"{row['p50_us']:.1f}", spread, f"{row['p99_us']:.1f}"]


def _target(target: Row) -> list[str]:
    limit = f"p50 at most {target['p50_us']:g} µs"
    if target["p99_us"] is not None:
        limit += f", p99 at most {target['p99_us']:g} µs"
    verdict = page.chip("held" if target["met"] else "missed", limit)
    numbers = [f"{target[key]:,}" for key in ("nodes", "committed")]
    return [*numbers, f"{target['worst_p50_us']:.1f}", f"{target['worst_p99_us']:.1f}", verdict]


def _chart(label: str, key: str, rows: Sequence[Row]) -> str:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(row["policy"], []).append((row[key], row["p50_us"]))
    most = max(row[key] for row in rows)
    highest = 1.05 * max(row["p50_us"] for row in rows)
    chart = svg.Chart.plot(1060, 300, (0.0, most), (0.0, highest), margins=_MARGINS)
    chart.axes(label, "median, µs")
    for policy, points in lines.items():
        chart.line(sorted(points), policy_color(policy))
        chart.dots(points, policy_color(policy))
    return chart.render(f"Median time of a decision over {label}")
