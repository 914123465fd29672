"""What the demo prints: a progress bar while it runs, one table at the end."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.demo.table import COLUMNS, Column, cell

_VERDICT_STYLES = {"held": "green", "missed": "red", "unresolved": "yellow"}

#: Drawings of the bar per second: rich's own 10 cost a noticeable part of a core while a policy is measured.
_REFRESH_HZ = 2


class Terminal:
    """Steps of known length in seconds, one after the other, on one bar."""

    def __init__(self, console: Console, total_s: float) -> None:
        self.console = console
        self._progress = Progress(
            BarColumn(bar_width=32),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            refresh_per_second=_REFRESH_HZ,
        )
        self._task = self._progress.add_task("", total=total_s)
        self._done_s = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Show the bar."""
        with self._progress:
            yield

    @contextmanager
    def step(self, description: str, length_s: float) -> Iterator["Terminal"]:
        """A part of the work that takes about so long."""
        self._progress.update(self._task, description=description)
        if not self.console.is_terminal:
            self.console.print(description)
        yield self
        self._done_s += length_s
        self._progress.update(self._task, completed=self._done_s)

    def advance(self, within_s: float, description: str) -> None:
        """Where the running step is."""
        self._progress.update(self._task, completed=self._done_s + within_s, description=description)

    def say(self, line: str) -> None:
        """A line that stays."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


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
        style = _VERDICT_STYLES[claim["verdict"]]
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
