"""Repetitions put together: medians with their spread, and what may be claimed from them. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def combine(repetitions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Key by key the median of the repetitions. A value missing (None) in some is the median of the others."""
    return {key: _combine_values([item.get(key) for item in repetitions]) for key in repetitions[0]}


def spread(repetitions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Key by key `[min, max]` over the repetitions, for numbers only."""
    result: dict[str, Any] = {}
    for key in repetitions[0]:
        values = [item.get(key) for item in repetitions]
        if all(isinstance(value, Mapping) for value in values):
            result[key] = spread([value for value in values if isinstance(value, Mapping)])
        else:
            numbers = _numbers(values)
            if numbers:
                result[key] = [min(numbers), max(numbers)]
    return result


def _combine_values(values: Sequence[Any]) -> Any:
    if all(isinstance(value, Mapping) for value in values):
        keys = list(dict.fromkeys(key for value in values for key in value))
        return {key: _combine_values([value.get(key) for value in values]) for key in keys}
    numbers = _numbers(values)
    if not numbers:
        return values[0]
    middle = statistics.median(numbers)
    whole = all(isinstance(number, int) for number in numbers)
    return round(middle) if whole else middle


def _numbers(values: Sequence[Any]) -> list[float]:
    return [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]


@dataclass(frozen=True, slots=True)
class Claim:
    """Something the demo is meant to show about lemix against another policy.

    `path` is a key of the metrics, `kind` "ratio" or "difference" of lemix to `against`; it holds when that is at least
    (`at_least` True) or at most `threshold`.
    """

    name: str
    text: str
    against: str
    path: tuple[str, ...]
    kind: str
    threshold: float
    at_least: bool


CLAIMS = (
    Claim(
        "throughput",
        "lemix finishes more tasks per held node-second than separate clusters",
        "separate",
        ("tasks_per_held_node_s",),
        "ratio",
        1.0,
        True,
    ),
    Claim(
        "attainment",
        "lemix keeps the response-time promise at least as often as separate clusters",
        "separate",
        ("slo_attainment",),
        "difference",
        0.0,
        True,
    ),
    Claim(
        "attainment_over_naive",
        "lemix keeps the response-time promise more often than naive mixing",
        "round_robin",
        ("slo_attainment",),
        "difference",
        0.0,
        True,
    ),
    Claim(
        "loss_after_drift",
        "after the drift, lemix serves at no higher a loss than separate clusters",
        "separate",
        ("inference_loss", "after_drift"),
        "ratio",
        1.0,
        False,
    ),
    Claim(
        "training",
        "lemix trains at least 1.3 times the tokens of separate clusters",
        "separate",
        ("trained_tokens_per_s",),
        "ratio",
        1.3,
        True,
    ),
)
#: Ratios and shares of one and the same policy differ by about this much from run to run.
_SINGLE_RUN_NOISE = 0.03


def verdicts(repetitions: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Every claim whose two policies ran: values per repetition (paired), median, and the verdict.

    "held" or "missed" when every repetition agrees, "unresolved" when their spread spans the threshold or nothing was
    measured. A single repetition has no spread: within `_SINGLE_RUN_NOISE` of the threshold it decides nothing.
    """
    if "lemix" not in repetitions:
        return []
    return [_judge(claim, repetitions) for claim in CLAIMS if claim.against in repetitions]


def _judge(claim: Claim, repetitions: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    pairs = zip(repetitions["lemix"], repetitions[claim.against], strict=True)
    values = [_compare(claim, _at(mine, claim.path), _at(theirs, claim.path)) for mine, theirs in pairs]
    known = [value for value in values if value is not None]
    too_close = len(values) == 1 and bool(known) and abs(known[0] - claim.threshold) < _SINGLE_RUN_NOISE
    if len(known) < len(values) or too_close:
        verdict = "unresolved"
    else:
        good = [value >= claim.threshold if claim.at_least else value <= claim.threshold for value in known]
        verdict = "held" if all(good) else "unresolved" if any(good) else "missed"
    return {
        "name": claim.name,
        "claim": claim.text,
        "against": claim.against,
        "metric": ".".join(claim.path),
        "kind": claim.kind,
        "threshold": claim.threshold,
        "direction": "at least" if claim.at_least else "at most",
        "values": values,
        "median": statistics.median(known) if known else None,
        "verdict": verdict,
    }


def _compare(claim: Claim, mine: float | None, theirs: float | None) -> float | None:
    if mine is None or theirs is None:
        return None
    if claim.kind == "difference":
        return mine - theirs
    return mine / theirs if theirs > 0 else None


def _at(values: Any, path: Sequence[str]) -> float | None:
    for key in path:
        values = values[key]
    return None if values is None else float(values)
