"""How little node time is possible at all at a point of the grid, when promises are kept.

Two bounds (`promised`) stand beside the clairvoyant one. `promised`: with as many promises kept as LeMix kept, no later
response and no later end. `possible`: within what the other claims demand, measured by what separate clusters did at
the point: attainment, end of the last task and, where those are not overloaded, the worst response.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from bench.paper.claims import judged, threshold
from bench.paper.compare import by_seed, geomean, is_overloaded
from bench.paper.config import BASELINE, SUBJECT
from bench.paper.program import InfeasibleError
from bench.paper.promised import Terms, promised_node_s
from bench.paper.scenario import HOLD_S, SLO_UNITS, Point, Run, cluster, work
from services.simulator.clairvoyant import demands

Row = Mapping[str, Any]

KEY = "promises"
NAMES = PROMISED, POSSIBLE = "promised", "possible"
#: The figures of a point, as shares.
SHARES = ("efficiency", "promised_efficiency", "possible_efficiency")


@dataclass(frozen=True, slots=True)
class Limit:
    """The least node time in which any policy does the tasks of a run under some terms; a job like a run."""

    run: Run
    terms: Terms

    @property
    def policy(self) -> str:
        """Shown with the progress."""
        return "bound"

    @property
    def num_tasks(self) -> int:
        """Of the run."""
        return self.run.num_tasks

    def row(self) -> dict[str, Any]:
        """The bound, `limit_node_s`; None when nobody can keep the terms."""
        run, point = self.run, self.run.point
        tasks = demands(work(run), cluster(run))
        limit_s = None
        with suppress(InfeasibleError):
            limit_s = promised_node_s(tasks, self.terms, nodes=run.nodes, hold_s=HOLD_S)
        return {
            "rate": point.rate,
            "training_share": point.training_share,
            "mean_forward_s": point.mean_forward_s,
            "seed": run.seed,
            "limit_node_s": limit_s,
        }


Job = Run | Limit


def limits(rows: Sequence[Row], seeds: Sequence[int]) -> list[tuple[str, Limit]]:
    """Both bounds for every point of the seeds at which LeMix ended every task, by name."""
    found = []
    for seed, points in by_seed(rows).items():
        for point in points.values() if seed in seeds else ():
            if SUBJECT in point and point[SUBJECT]["efficiency"] is not None:
                own, others = point[SUBJECT], point[BASELINE]
                found += [(PROMISED, Limit(_run(own), _reached(own))), (POSSIBLE, Limit(_run(own), _demanded(others)))]
    return found


def _run(row: Row) -> Run:
    point = Point(row["rate"], row["training_share"], row["mean_forward_s"])
    return Run(point, row["policy"], row["seed"], row["n_tasks"])


def _reached(row: Row) -> Terms:
    slo_s = SLO_UNITS * _run(row).unit_s
    worst_s = row["worst_response_slos"] * slo_s
    return Terms(slo_s, round(row["slo_attainment"] * row["n_requests"]), row["makespan_s"], worst_s)


def _demanded(row: Row) -> Terms:
    slo_s = SLO_UNITS * _run(row).unit_s
    attainment = row["slo_attainment"] + threshold("attainment_worst") / 100.0
    worst_s = math.inf if is_overloaded(row) else threshold("worst_response") * slo_s
    kept = max(0, math.ceil(attainment * row["n_requests"] - 1e-9))
    return Terms(slo_s, kept, threshold("makespan") * row["makespan_s"], worst_s)


def summarise(rows: Sequence[Row], bounds: Sequence[Row]) -> dict[str, Any]:
    """Point by point and together; nothing without bounds. bounds: rows of `limits`, labelled with their names."""
    known = {(bound["label"], *_place(bound)): bound["limit_node_s"] for bound in bounds}
    points = [
        _shares(row, known[PROMISED, *_place(row)], known[POSSIBLE, *_place(row)])
        for row in rows
        if row["policy"] == SUBJECT and (PROMISED, *_place(row)) in known
    ]
    if not points:
        return {}
    seeds = dict.fromkeys(point["seed"] for point in points)
    each = [[point for point in points if point["seed"] == seed] for seed in seeds]
    together = {name: [geomean([point[name] for point in several]) for several in each] for name in SHARES}
    claim = judged(
        "promised_efficiency",
        "share of what is possible with as many promises kept: least such node time / held node time, geometric mean",
        f"{KEY}.promised_efficiency",
        together["promised_efficiency"],
        threshold("efficiency"),
        "{:.2f}",
    )
    return {KEY: {"seeds": list(seeds), **together, "points": points}, "claims": [claim]}


def _place(row: Row) -> tuple[float, float, float, int]:
    return row["rate"], row["training_share"], row["mean_forward_s"], row["seed"]


def _shares(row: Row, promised_s: float | None, possible_s: float | None) -> dict[str, Any]:
    bound_s, held_s = row["clairvoyant_node_s"], row["held_node_s"]
    return {
        "rate": row["rate"],
        "training_share": row["training_share"],
        "mean_forward_s": row["mean_forward_s"],
        "seed": row["seed"],
        "held_node_s": held_s,
        "clairvoyant_node_s": bound_s,
        "promised_node_s": promised_s,
        "possible_node_s": possible_s,
        "efficiency": row["efficiency"],
        "promised_efficiency": None if promised_s is None else promised_s / held_s,
        "possible_efficiency": None if possible_s is None else bound_s / possible_s,
    }
