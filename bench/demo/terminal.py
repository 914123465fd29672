"""What the demo prints at the end: the figures of every policy and the verdicts."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.demo.table import COLUMNS
from bench.demo.verdict import limit, meaning, shown
from bench.report.table import Column, cell
from bench.report.verdict import STYLES

#: Columns side by side: what 80 characters hold with a spread below every value.
_COLUMNS_PER_TABLE = 5


def print_results(console: Console, summary: Mapping[str, Any]) -> None:
    """The tables, the warnings and the claims, within 80 columns."""
    for first in range(0, len(COLUMNS), _COLUMNS_PER_TABLE):
        columns = COLUMNS[first : first + _COLUMNS_PER_TABLE]
        console.print(_table(summary, columns, None if first else _title(summary)))
    lines = Table.grid(padding=(0, 1, 0, 0))
    lines.add_column(justify="right", no_wrap=True, min_width=10)
    lines.add_column()
    for warning in summary["warnings"]:
        lines.add_row(Text("warning", "yellow"), Text(warning))
    for claim in summary["claims"]:
        lines.add_row(Text(claim["verdict"], STYLES[claim["verdict"]]), Text(_claim(claim)))
    if any(claim["verdict"] == "unresolved" for claim in summary["claims"]):
        lines.add_row("", Text(meaning(summary["repetitions"]), "dim"))
    console.print(lines)


def _table(summary: Mapping[str, Any], columns: Sequence[Column], title: str | None) -> Table:
    policies = summary["policies"]
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column.title, justify="right", vertical="bottom")
    best = [column.best(policies) for column in columns]
    for name, metrics in policies.items():
        values = zip(columns, best, strict=True)
        table.add_row(name, *(_cell(column, summary, name, metrics, name == winner) for column, winner in values))
    return table


def _cell(column: Column, summary: Mapping[str, Any], name: str, metrics: Mapping[str, Any], is_best: bool) -> Text:
    shown_value = Text(cell(column, metrics), "bold" if is_best else "")
    extent = column.value(summary["spread"].get(name, {}))
    if not isinstance(extent, list):
        return shown_value
    low, high = (column.format(value).removesuffix(" %") for value in extent)
    return shown_value + Text(f"\n{low}–{high}", "dim")


def _title(summary: Mapping[str, Any]) -> str:
    repetitions = summary["repetitions"]
    return f"Medians of {repetitions} repetitions, smallest–largest below" if repetitions > 1 else "Results per policy"


def _claim(claim: Mapping[str, Any]) -> str:
    reason = f"({claim['reason']}) " if claim["reason"] else ""
    return f"{reason}{claim['claim']}: {shown(claim, claim['median'])}{_extent(claim)} ({limit(claim)})"


def _extent(claim: Mapping[str, Any]) -> str:
    """Smallest and largest of several repetitions."""
    known = [value for value in claim["values"] if value is not None]
    return f", {shown(claim, min(known))} to {shown(claim, max(known))}" if len(known) > 1 else ""
