"""What is printed at the end: the comparison and every claim."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.paper.claims import limit, shown
from bench.paper.table import COLUMNS
from bench.report.table import cell
from bench.report.verdict import STYLES

#: The others have a claim below the table.
_COLUMNS = [column for column in COLUMNS if column.title not in ("max ratio", "makespan max")]


def print_results(console: Console, summary: Mapping[str, Any]) -> None:
    """The table, the problems and the claims."""
    policies = summary["vs_separate"]
    table = Table(title=_title(summary), title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for column in _COLUMNS:
        table.add_column(column.title, justify="right", vertical="bottom")
    best = [column.best(policies) for column in _COLUMNS]
    for name, metrics in policies.items():
        values = [cell(column, metrics) for column in _COLUMNS]
        table.add_row(
            name,
            *(f"[bold]{value}[/bold]" if name == winner else value for value, winner in zip(values, best, strict=True)),
        )
    console.print(table)
    for problem in summary["problems"]:
        console.print(f"[red]   problem[/red]  {problem}", highlight=False, soft_wrap=True)
    for claim in summary["claims"]:
        style = STYLES[claim["verdict"]]
        console.print(
            f"[{style}]{claim['verdict']:>10}[/{style}]  {claim['claim']}: {shown(claim, claim['median'])} "
            f"({limit(claim)}){_extent(claim)}",
            highlight=False,
            soft_wrap=True,
        )


def _title(summary: Mapping[str, Any]) -> str:
    baseline = summary["vs_separate"]["separate"]
    return (
        f"{baseline['points']} points, {len(summary['seeds'])} seeds, {len(summary['grid'])} simulations; "
        f"{baseline['excluded']} points overload every policy"
    )


def _extent(claim: Mapping[str, Any]) -> str:
    known = [value for value in claim["values"] if value is not None]
    if len(known) < 2:
        return ""
    return f"; seeds {shown(claim, min(known))} – {shown(claim, max(known))}"
