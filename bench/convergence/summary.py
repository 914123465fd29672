"""`summary.json`: final figures and curves of every policy, with what they were made on. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.convergence.config import POLICIES, REFERENCE, Run, StudyConfig
from bench.report.verdict import combine, decide, spread

#: Seeds of one policy differ by about this share.
_SINGLE_RUN_NOISE = 0.005


def build(
    config: StudyConfig, results: Mapping[Run, Mapping[str, Any]], facts: Mapping[str, Any], text: str
) -> dict[str, Any]:
    """The summary. `facts`: what is told of machine, commit, model and time; `text`: what was trained on."""
    rows = []
    for policy, count in contestants(config):
        of_seeds = [final(results, Run(policy, count, seed)) for seed in range(config.seeds)]
        curves = [results[Run(policy, count, seed)]["points"] for seed in range(config.seeds)]
        rows.append(
            {
                "policy": policy.name,
                "title": policy.title,
                "replicas": count,
                "final": combine(of_seeds),
                "spread": spread(of_seeds),
                "curve": [_point(points) for points in zip(*curves, strict=True)],
            }
        )
    return {
        **facts,
        "text": text,
        "updates": config.updates,
        "seeds": config.seeds,
        "results": rows,
        "claims": _claims(config, results),
        "config": config.to_json(),
    }


def contestants(config: StudyConfig) -> list[tuple[Any, int]]:
    """(policy, replicas), the reference first."""
    return [(REFERENCE, 1), *((POLICIES[name], count) for count in config.replicas for name in config.policies)]


def final(results: Mapping[Run, Mapping[str, Any]], run: Run) -> dict[str, float]:
    """Figures at the end of one run, with its loss over that of the reference of the same seed.

    over_reference_in_time: the reference after as many steps as each trainer made, so after the same time.
    """
    result = results[run]
    last = result["points"][-1]
    reference = results[Run(REFERENCE, 1, run.seed)]["points"]
    return {
        "loss": last["loss"],
        "over_reference": last["loss"] / reference[-1]["loss"],
        "over_reference_in_time": last["loss"] / _loss_at(reference, last["updates"] / run.num_trainers),
        "worst": last["worst"],
        "distance": last["distance"],
        "kl": last["kl"],
        "training_loss": result["training_loss"],
        "rounds": result["rounds"],
        "seconds": result["seconds"],
    }


def _loss_at(points: Sequence[Mapping[str, float]], updates: float) -> float:
    """Between two points, linearly; before the first one, the first."""
    before = [point for point in points if point["updates"] <= updates] or [points[0]]
    after = [point for point in points if point["updates"] >= updates]
    low, high = before[-1], after[0]
    span = high["updates"] - low["updates"]
    share = max(0.0, (updates - low["updates"]) / span) if span else 0.0
    return low["loss"] + share * (high["loss"] - low["loss"])


def _point(points: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """One time of a curve over the seeds: medians, and the range of the loss."""
    losses = [point["loss"] for point in points]
    middle = {name: statistics.median(point[name] for point in points) for name in ("loss", "distance", "kl")}
    return {"updates": points[0]["updates"], **middle, "loss_low": min(losses), "loss_high": max(losses)}


#: (policy, other policy, what it says): the held-out loss of the first is at most that of the second.
_CLAIMS = (
    ("average_10", "none", "averaging every 10 steps serves at no higher loss than replicas left alone"),
    ("average_10", "checkpoint_100", "averaging every 10 steps serves at no higher loss than a copy every 100 steps"),
    ("average_10", "average_1", "averaging every 10 steps serves at no higher loss than averaging at every step"),
    ("average_100", "none", "averaging every 100 steps serves at no higher loss than replicas left alone"),
)


def _claims(config: StudyConfig, results: Mapping[Run, Mapping[str, Any]]) -> list[dict[str, Any]]:
    claims = []
    for count in config.replicas:
        for name, other, meaning in _CLAIMS:
            if name in config.policies and other in config.policies:
                values = [
                    final(results, Run(POLICIES[name], count, seed))["loss"]
                    / final(results, Run(POLICIES[other], count, seed))["loss"]
                    for seed in range(config.seeds)
                ]
                verdict = decide(values, 1.0, at_least=False, single_run_noise=_SINGLE_RUN_NOISE)
                claims.append(
                    {
                        "name": f"{name}_over_{other}_{count}",
                        "claim": f"{count} replicas: {meaning}",
                        "values": values,
                        "median": statistics.median(values),
                        "verdict": verdict,
                    }
                )
    return claims
