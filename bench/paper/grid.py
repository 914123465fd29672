"""The full factorial of rate, training share and mean forward: the paper's main figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.paper import compare, grid_report
from bench.paper.claims import verdicts
from bench.paper.config import PaperConfig
from bench.paper.family import Family, Labelled
from bench.paper.variants import everywhere


def runs(config: PaperConfig) -> list[Labelled]:
    """Every policy on every point and seed."""
    return [
        labelled
        for policy in config.policies
        for labelled in everywhere(policy, config.points(), config.seeds, config.num_tasks, policy)
    ]


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows, comparison with separate clusters, points without a winner, verdicts."""
    medians, extents, repetitions = compare.against_baseline(rows)
    return {
        "vs_separate": medians,
        "spread": extents,
        "overloaded": compare.overloaded_points(rows),
        "claims": verdicts(repetitions),
        "grid": list(rows),
    }


GRID = Family("grid", runs, summarise, grid_report.tables, grid_report.sections)
