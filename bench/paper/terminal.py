"""What is printed at the end: a table per family, the problems and every claim."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.paper.claims import limit, shown
from bench.paper.family import Family, Shown
from bench.report.verdict import STYLES


def print_results(console: Console, families: Sequence[Family], summary: Mapping[str, Any]) -> None:
    """The tables, the problems and the claims."""
    for family in families:
        for item in family.tables(summary):
            console.print(_table(item))
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


def _table(item: Shown) -> Table:
    table = Table(title=item.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column(item.head[0], no_wrap=True)
    for place, name in enumerate(item.head[1:], start=1):
        widest = max(len(values[place]) for values in item.rows)
        table.add_column(name, justify="right", vertical="bottom", min_width=widest)
    for row, values in enumerate(item.rows):
        table.add_row(
            *(f"[bold]{value}[/bold]" if (row, place) in item.bold else value for place, value in enumerate(values))
        )
    return table


def _extent(claim: Mapping[str, Any]) -> str:
    known = [value for value in claim["values"] if value is not None]
    if len(known) < 2:
        return ""
    return f"; seeds {shown(claim, min(known))} – {shown(claim, max(known))}"
