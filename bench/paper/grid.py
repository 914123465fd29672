"""The full factorial of rate, training share and mean forward: the paper's main figures."""

from collections.abc import Sequence
from typing import Any

from bench.paper import compare, grid_report, limits
from bench.paper.claims import verdicts
from bench.paper.config import PaperConfig
from bench.paper.family import Family, Labelled, Row
from bench.paper.variants import everywhere


def runs(config: PaperConfig) -> list[Labelled]:
    """Every policy on every point and seed."""
    return [
        labelled
        for policy in config.policies
        for labelled in everywhere(policy, config.points(), config.seeds, config.num_tasks, policy)
    ]


def bounds(config: PaperConfig, rows: Sequence[Row]) -> list[Labelled]:
    """What is possible when promises are kept: on the first seed, for a bound takes as long as a simulation."""
    return [Labelled(name, limit) for name, limit in limits.limits(rows, config.first_seed)]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows, comparison with separate clusters, points without a winner, what is possible, verdicts."""
    bound = [row for row in rows if row["label"] in limits.NAMES]
    rows = [row for row in rows if row["label"] not in limits.NAMES]
    medians, extents, repetitions = compare.against_baseline(rows)
    possible = limits.summarise(rows, bound)
    return {
        "vs_separate": medians,
        "spread": extents,
        "overloaded": compare.overloaded_points(rows),
        "grid": list(rows),
        **possible,
        "claims": [*verdicts(repetitions), *possible.get("claims", [])],
    }


GRID = Family("grid", runs, summarise, grid_report.tables, grid_report.sections, bounds)
