"""What the command prints at the end."""

import math
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.fidelity.report import percent
from bench.report.verdict import STYLES


def print_results(console: Console, summary: Mapping[str, Any]) -> None:
    """Errors, distances, warnings and verdicts."""
    console.print(_predictions(summary["real"]))
    console.print(_distances(summary))
    lines = Table.grid(padding=(0, 1, 0, 0))
    lines.add_column(justify="right", no_wrap=True, min_width=10)
    lines.add_column()
    for warning in summary["warnings"]:
        lines.add_row(Text("warning", "yellow"), Text(warning))
    for claim in summary["claims"]:
        within = "; ".join(filter(None, (claim["note"], claim["limit"])))
        told = f"{claim['claim']}: {claim['shown']} ({within})"
        if claim["reason"]:
            told += f": {claim['reason']}"
        lines.add_row(Text(claim["verdict"], STYLES[claim["verdict"]]), Text(told))
    console.print(lines)


def _predictions(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title="Predictions, real engine", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for title in ("", "count", "error", "of profile\nalone", "noise\nfloor", "within\ninterval"):
        table.add_column(title, justify="right" if title else "left", no_wrap=bool(title))
    for name, run in runs.items():
        for kind, found in run["ops"]["kinds"].items():
            table.add_row(
                f"{name}: {kind}",
                str(found["ops"]),
                percent(found["online_mape"]),
                percent(found["profile_mape"]),
                percent(found["noise_floor"]),
                percent(found["online_coverage"]),
            )
        responses = run["responses"]
        table.add_row(
            f"{name}: first token",
            str(responses["requests"]),
            percent(responses["mape"]),
            "",
            percent(responses["noise_floor"]),
            "",
        )
    return table


def _distances(summary: Mapping[str, Any]) -> Table:
    table = Table(title="Simulator less live", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for title in (
        "",
        "count",
        "attained\npoints",
        "tokens/s\n%",
        "TTFT p95\n%",
        "utilised\npoints",
        "live runs\napart",
    ):
        table.add_column(title, justify="right" if title else "left", no_wrap=bool(title))
    keys = ("slo_attainment_points", "throughput_pct", "ttft_p95_pct", "utilisation_points")
    real = [{**entry, "workload": f"CPU: {name}"} for name, entry in summary["simulator_vs_cpu"].items()]
    for entry in [*summary["simulator_vs_live"], *real]:
        values = ["–" if entry[key] is None else f"{entry[key]:+.1f}" for key in keys]
        twice = entry.get("live_spread")
        values.append(
            "" if twice is None else f"{twice['slo_attainment_points']:.1f}, {twice['ttft_p95_pct'] or math.inf:.1f}"
        )
        table.add_row(entry["workload"], str(entry["live"]["requests"]), *values)
    return table
