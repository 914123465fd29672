"""What the rows of the grid come to against separate clusters. Pure.

A policy is overloaded at a point when it keeps fewer than half of its promises there. A point at which every policy is
overloaded says little about any of them: it is reported apart and left out of the smallest ratios.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.paper.config import BASELINE
from bench.report.verdict import combine, spread

Row = Mapping[str, Any]
#: (rate, training share, mean forward), and the rows of its policies.
Place = tuple[float, float, float]
Points = dict[Place, dict[str, Row]]

OVERLOADED_BELOW = 0.5
#: A ratio of attainments needs a denominator that means something.
RATIO_FROM = 0.1


def place(row: Row) -> Place:
    """Where in the grid a row is."""
    return row["rate"], row["training_share"], row["mean_forward_s"]


def by_seed(rows: Iterable[Row]) -> dict[int, Points]:
    """Seed -> place -> policy -> row."""
    result: dict[int, Points] = {}
    for row in rows:
        result.setdefault(row["seed"], {}).setdefault(place(row), {})[row["policy"]] = row
    return result


def is_overloaded(row: Row) -> bool:
    """Whether the policy breaks more than half of its promises."""
    return bool(row["slo_attainment"] < OVERLOADED_BELOW)


def all_overloaded(point: Mapping[str, Row]) -> bool:
    """Whether every policy is overloaded there."""
    return all(is_overloaded(row) for row in point.values())


def against_baseline(rows: Sequence[Row]) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """By policy: medians over the seeds, smallest and largest, and the figures of every seed."""
    seeds = by_seed(rows)
    policies = dict.fromkeys(row["policy"] for row in rows)
    repetitions = {name: [_compare(points, name) for points in seeds.values()] for name in policies}
    medians = {name: combine(items) for name, items in repetitions.items()}
    return medians, {name: spread(items) for name, items in repetitions.items()}, repetitions


def overloaded_points(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Points at which every policy is overloaded, with what each policy did there."""
    return [
        {
            "rate": where[0],
            "training_share": where[1],
            "mean_forward_s": where[2],
            "seed": seed,
            "slo_attainment": {name: row["slo_attainment"] for name, row in point.items()},
            "throughput_ratio": {name: _throughput_ratio(point, name) for name in point},
        }
        for seed, points in by_seed(rows).items()
        for where, point in points.items()
        if all_overloaded(point)
    ]


def _compare(points: Points, policy: str) -> dict[str, Any]:
    """One policy against the baseline, over the grid of one seed."""
    everywhere = list(points.values())
    judged = [point for point in everywhere if not all_overloaded(point)]
    calm = [point for point in everywhere if not is_overloaded(point[BASELINE])]
    ratios = [_throughput_ratio(point, policy) for point in everywhere]
    gains = [100.0 * (point[policy]["slo_attainment"] - point[BASELINE]["slo_attainment"]) for point in everywhere]
    mine = [point[policy] for point in everywhere]
    return {
        "throughput_ratio": {
            "geomean": geomean(ratios),
            "max": max(ratios),
            "min": _least(_throughput_ratio(point, policy) for point in judged),
        },
        "attainment_ratio": {
            "max": _most(_attainment_ratios(everywhere, policy)),
            "min": _least(_attainment_ratios(judged, policy)),
        },
        "attainment_points": {"worst": min(gains)},
        "attainment_mean": sum(row["slo_attainment"] for row in mine) / len(mine),
        "attainment_weighted": geomean([_weighted(row) for row in mine]),
        "efficiency": geomean([row["efficiency"] for row in mine]),
        "makespan_ratio": {"max": max(p[policy]["makespan_s"] / p[BASELINE]["makespan_s"] for p in everywhere)},
        "worst_response_slos": _worst([point[policy]["worst_response_slos"] for point in calm]),
        "points": len(everywhere),
        "excluded": len(everywhere) - len(judged),
    }


def _throughput_ratio(point: Mapping[str, Row], policy: str) -> float:
    return float(point[policy]["tasks_per_held_node_s"] / point[BASELINE]["tasks_per_held_node_s"])


def _attainment_ratios(points: Iterable[Mapping[str, Row]], policy: str) -> list[float]:
    pairs = ((point[policy]["slo_attainment"], point[BASELINE]["slo_attainment"]) for point in points)
    return [mine / theirs for mine, theirs in pairs if theirs >= RATIO_FROM]


def _weighted(row: Row) -> float:
    """Tasks per held node-second times the share of promises kept, of which at least one request's worth counts."""
    least = 1.0 / max(1, row["n_requests"])
    return float(row["tasks_per_held_node_s"] * max(least, row["slo_attainment"]))


def geomean(values: Sequence[float | None]) -> float | None:
    """The geometric mean; None when a value is missing or not positive."""
    known = [value for value in values if value is not None and value > 0.0]
    if not known or len(known) < len(values):
        return None
    return math.exp(sum(map(math.log, known)) / len(known))


def _worst(values: Sequence[float | None]) -> float | None:
    """None without values, or when one request got no response at all."""
    known = [value for value in values if value is not None]
    return max(known) if known and len(known) == len(values) else None


def _most(values: Iterable[float]) -> float | None:
    return max(values, default=None)


def _least(values: Iterable[float]) -> float | None:
    return min(values, default=None)
