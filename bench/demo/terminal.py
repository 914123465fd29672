"""What the demo prints at the end: one table and the verdicts."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.demo.table import COLUMNS
from bench.report.table import Column, cell
from bench.report.verdict import STYLES


def print_results(console: Console, summary: Mapping[str, Any]) -> None:
    """The table, the claims, and where everything is."""
    policies = summary["policies"]
    table = Table(title=_title(summary), title_justify="left", header_style="bold")
    table.add_column("")
    for name in policies:
        table.add_column(name, justify="right", no_wrap=True)
    for column in COLUMNS:
        best = column.best(policies)
        table.add_row(
            column.title, *(_cell(column, summary, name, metrics, name == best) for name, metrics in policies.items())
        )
    console.print(table)
    for warning in summary["warnings"]:
        console.print(f"[yellow]   warning[/yellow]  {warning}", highlight=False, soft_wrap=True)
    for claim in summary["claims"]:
        style = STYLES[claim["verdict"]]
        console.print(
            f"[{style}]{claim['verdict']:>10}[/{style}]  {claim['claim']}: {_values(claim)}",
            highlight=False,
            soft_wrap=True,
        )


def _cell(column: Column, summary: Mapping[str, Any], name: str, metrics: Mapping[str, Any], is_best: bool) -> str:
    shown = cell(column, metrics)
    shown = f"[bold]{shown}[/bold]" if is_best else shown
    extent = cell(column, summary["spread"].get(name, {})) if summary["spread"] else ""
    return f"{shown}\n[dim]{extent}[/dim]" if extent else shown


def _title(summary: Mapping[str, Any]) -> str:
    slo, workload = summary["slo"], summary["workload"]
    return (
        f"{workload['requests']} requests in {workload['seconds']:g} s per policy; SLO: TTFT {slo['ttft_ms']:.0f} ms, "
        f"TPOT {slo['tpot_ms']:.1f} ms"
    )


def _values(claim: Mapping[str, Any]) -> str:
    if claim["median"] is None:
        return "not measured"
    if claim["kind"] == "difference":
        return f"{100 * claim['median']:+.1f} points (at least {100 * claim['threshold']:+.1f})"
    return f"{claim['median']:.2f} times ({claim['direction']} {claim['threshold']:.2f})"
