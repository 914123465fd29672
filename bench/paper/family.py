"""What an axis of the evaluation is made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.paper.config import PaperConfig
from bench.paper.scenario import Run


@dataclass(frozen=True, slots=True)
class Family:
    """runs: what is simulated. summarise: rows of those runs, in order, to keys of `summary.json`; `claims` and
    `problems` (why figures may mislead) are joined with those of the other families. sections: HTML from the summary.
    """

    name: str
    runs: Callable[[PaperConfig], list[Run]]
    summarise: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
    sections: Callable[[PaperConfig, Mapping[str, Any]], list[str]]
