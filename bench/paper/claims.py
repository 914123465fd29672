"""What LeMix is to reach in the grid, and whether it does. A miss is printed as a miss. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.paper.config import SUBJECT
from bench.report.verdict import decide


@dataclass(frozen=True, slots=True)
class Claim:
    """`path` leads to the figure of a policy (see `compare`). `form` shows it; it must be at least, or at most, the
    threshold. over_others: the figure is divided by the best of all other policies."""

    name: str
    text: str
    path: tuple[str, ...]
    threshold: float
    form: str
    at_least: bool = True
    over_others: bool = False


CLAIMS = (
    Claim(
        "throughput",
        "tasks per held node-second over separate clusters, geometric mean of all points",
        ("throughput_ratio", "geomean"),
        1.7,
        "{:.2f}×",
    ),
    Claim("throughput_max", "the same at the best point", ("throughput_ratio", "max"), 2.4, "{:.2f}×"),
    Claim(
        "throughput_min",
        "the same at the worst point that some policy can serve",
        ("throughput_ratio", "min"),
        0.95,
        "{:.2f}×",
    ),
    Claim(
        "attainment_max",
        "SLO attainment over separate clusters at the best point",
        ("attainment_ratio", "max"),
        2.12,
        "{:.2f}×",
    ),
    Claim(
        "attainment_worst",
        "SLO attainment minus that of separate clusters at the worst point",
        ("attainment_points", "worst"),
        -2.0,
        "{:+.1f} points",
    ),
    Claim(
        "efficiency",
        "least possible held node time / held node time, geometric mean",
        ("efficiency",),
        0.80,
        "{:.2f}",
    ),
    Claim(
        "makespan",
        "end of the last task over separate clusters, at the worst point",
        ("makespan_ratio", "max"),
        1.6,
        "{:.2f}×",
        at_least=False,
    ),
    Claim(
        "worst_response",
        "worst response where separate clusters are not overloaded",
        ("worst_response_slos",),
        20.0,
        "{:.1f} SLOs",
        at_least=False,
    ),
    Claim(
        "attainment_weighted",
        "throughput weighted by attainment over the best other policy",
        ("attainment_weighted",),
        1.0,
        "{:.2f}×",
        over_others=True,
    ),
)


def threshold(name: str) -> float:
    """What the claim of that name is held against."""
    return next(claim.threshold for claim in CLAIMS if claim.name == name)


def verdicts(repetitions: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Every claim with its value per seed, the median, and whether it is held; none when LeMix did not run."""
    if SUBJECT not in repetitions or len(repetitions) < 2:
        return []
    return [_judge(claim, repetitions) for claim in CLAIMS]


def _judge(claim: Claim, repetitions: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    values = [_at(figures, claim.path) for figures in repetitions[SUBJECT]]
    if claim.over_others:
        values = over_others(repetitions, claim.path)
    return judged(
        claim.name, claim.text, ".".join(claim.path), values, claim.threshold, claim.form, at_least=claim.at_least
    )


def over_others(
    repetitions: Mapping[str, Sequence[Mapping[str, Any]]], path: Sequence[str], others: Sequence[str] | None = None
) -> list[float | None]:
    """Per seed LeMix's figure over the best of the `others`, or of all."""
    names = [name for name in repetitions if name != SUBJECT] if others is None else others
    mine = [_at(figures, path) for figures in repetitions[SUBJECT]]
    theirs = zip(*([_at(figures, path) for figures in repetitions[name]] for name in names), strict=True)
    return [_over(value, several) for value, several in zip(mine, theirs, strict=True)]


def judged(
    name: str,
    text: str,
    metric: str,
    values: Sequence[float | None],
    threshold: float,
    form: str,
    *,
    at_least: bool = True,
) -> dict[str, Any]:
    """A claim for the summary: its value per seed, the median, and whether it is held. form: shows a value."""
    known = [value for value in values if value is not None]
    return {
        "name": name,
        "claim": text,
        "metric": metric,
        "threshold": threshold,
        "direction": "at least" if at_least else "at most",
        "form": form,
        "values": list(values),
        "median": statistics.median(known) if known else None,
        "verdict": decide(values, threshold, at_least=at_least),
    }


def shown(claim: Mapping[str, Any], value: float | None, *, unit: bool = True) -> str:
    """A value of a claim as text."""
    if value is None:
        return "–"
    form = str(claim["form"])
    return (form if unit else form[: form.index("}") + 1]).format(value)


def limit(claim: Mapping[str, Any]) -> str:
    """The threshold as text."""
    return f"{claim['direction']} {shown(claim, claim['threshold'])}"


def _at(figures: Mapping[str, Any], path: Sequence[str]) -> float | None:
    value: Any = figures
    for key in path:
        value = value[key]
    return None if value is None else float(value)


def _over(mine: float | None, theirs: Sequence[float | None]) -> float | None:
    known = [value for value in theirs if value is not None]
    if mine is None or not known or max(known) <= 0.0:
        return None
    return mine / max(known)
