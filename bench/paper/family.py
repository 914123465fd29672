"""What an axis of the evaluation is made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bench.paper.config import PaperConfig
from bench.paper.limits import Job

Row = Mapping[str, Any]


class Labelled(NamedTuple):
    """A run, or a limit, under the name that it has in the tables of its family; its row gets it as `label`."""

    label: str
    run: Job


@dataclass(frozen=True, slots=True)
class Shown:
    """A table, the same on the terminal and on the page. Cells are plain text; bold: (row, column) of the best ones."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: frozenset[tuple[int, int]] = field(default=frozenset())


def nothing_more(config: PaperConfig, rows: Sequence[Row]) -> list[Labelled]:
    """A family whose runs are all known in advance."""
    del config, rows
    return []


@dataclass(frozen=True, slots=True)
class Family:
    """runs: what is simulated; a run that several families name is simulated once. then: runs and limits that depend on
    the rows of the first. summarise: rows of all of them, in order, to keys of `summary.json`; `claims` and `problems`
    (why figures may mislead) are joined with those of the other families. tables: for the terminal, from the summary.
    sections: HTML from the summary.
    """

    name: str
    runs: Callable[[PaperConfig], list[Labelled]]
    summarise: Callable[[Sequence[Row]], dict[str, Any]]
    tables: Callable[[Mapping[str, Any]], list[Shown]]
    sections: Callable[[PaperConfig, Mapping[str, Any]], list[str]]
    then: Callable[[PaperConfig, Sequence[Row]], list[Labelled]] = nothing_more
