"""The full factorial of rate, training share and mean forward: the paper's main figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.paper import compare, grid_report
from bench.paper.claims import verdicts
from bench.paper.config import PaperConfig
from bench.paper.family import Family
from bench.paper.scenario import Run


def runs(config: PaperConfig) -> list[Run]:
    """Every policy on every point and seed."""
    return [
        Run(point, policy, seed, config.num_tasks)
        for policy in config.policies
        for seed in config.seeds
        for point in config.points()
    ]


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows, comparison with separate clusters, points without a winner, verdicts."""
    medians, extents, repetitions = compare.against_baseline(rows)
    return {
        "vs_separate": medians,
        "spread": extents,
        "overloaded": compare.overloaded_points(rows),
        "claims": verdicts(repetitions),
        "problems": _problems(rows),
        "grid": list(rows),
    }


def _problems(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Runs in which not every task ended well: their bound does not hold."""
    unfinished: dict[str, int] = {}
    for row in rows:
        if row["n_ok"] < row["n_tasks"]:
            unfinished[row["policy"]] = unfinished.get(row["policy"], 0) + 1
    return [f"{policy}: {count} runs in which not every task ended well" for policy, count in unfinished.items()]


GRID = Family("grid", runs, summarise, grid_report.sections)
