"""What may be claimed from the repetitions of the demo. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.report.verdict import decide


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


def verdicts(
    repetitions: Mapping[str, Sequence[Mapping[str, Any]]], doubts: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Every claim whose two policies ran: values per repetition (paired), median, the verdict and its reason.

    "held" or "missed" when every repetition agrees; "unresolved" (`reason` says why) when their spread spans the
    threshold, when nothing was measured, or when `doubts` names one of the two policies with why its figures are worth
    nothing. A single repetition has no spread: within `_SINGLE_RUN_NOISE` of the threshold it decides nothing.
    """
    if "lemix" not in repetitions:
        return []
    return [_judge(claim, repetitions, doubts or {}) for claim in CLAIMS if claim.against in repetitions]


def limit(claim: Mapping[str, Any]) -> str:
    """What the value of a claim is held against, in words."""
    factor = 100 if claim["kind"] == "difference" else 1
    return f"needs {claim['direction']} {factor * claim['threshold']:g}"


def meaning(repetitions: int) -> str:
    """What "unresolved" stands for with so many repetitions, in a line."""
    if repetitions > 1:
        return "Unresolved: the repetitions disagree, or the machine was shared."
    return (
        f"Unresolved: within {_SINGLE_RUN_NOISE:g} (or {100 * _SINGLE_RUN_NOISE:g} points) of the limit, the noise of "
        "one repetition, or the machine was shared."
    )


def shown(claim: Mapping[str, Any], value: float | None) -> str:
    """A value of a claim in words."""
    if value is None:
        return "not measured"
    return f"{100 * value:+.1f} points" if claim["kind"] == "difference" else f"{value:.2f} times"


def _judge(
    claim: Claim, repetitions: Mapping[str, Sequence[Mapping[str, Any]]], doubts: Mapping[str, str]
) -> dict[str, Any]:
    pairs = zip(repetitions["lemix"], repetitions[claim.against], strict=True)
    values = [_compare(claim, _at(mine, claim.path), _at(theirs, claim.path)) for mine, theirs in pairs]
    known = [value for value in values if value is not None]
    verdict = decide(values, claim.threshold, at_least=claim.at_least, single_run_noise=_SINGLE_RUN_NOISE)
    doubt = doubts.get("lemix") or doubts.get(claim.against)
    reason = doubt or (_why_unresolved(claim, values) if verdict == "unresolved" else "")
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
        "verdict": "unresolved" if doubt else verdict,
        "reason": reason,
    }


def _why_unresolved(claim: Claim, values: Sequence[float | None]) -> str:
    if None in values:
        return "not measured"
    if len(values) > 1:
        return "the repetitions disagree"
    noise = f"{100 * _SINGLE_RUN_NOISE:g} points" if claim.kind == "difference" else f"{_SINGLE_RUN_NOISE:g}"
    return f"one repetition, and within {noise} of the limit"


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
