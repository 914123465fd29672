"""Puts everything measured into `summary.json`. Pure but for the facts of the run."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.fidelity.claims import of_calibration, verdicts
from bench.fidelity.config import FidelityConfig
from bench.fidelity.real import SERVING, TRAINING
from bench.live.cpu import OTHERS
from bench.report.verdict import combine
from lemix.internal.v1 import profile_pb2

#: Share of the machine's CPU time that other programs may use before the figures are doubted.
_MAX_OTHERS = 0.1
_QUICK = "a quick run"


def prediction(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The short figures of the two runs on the real engine; the calibrated predictions are those that count."""
    serving, training = runs[SERVING], runs[TRAINING]
    coverages = [run["ops"]["online_coverage"] for run in (serving, training)]
    known = [coverage for coverage in coverages if coverage is not None]
    return {
        "op_mape": serving["ops"]["online_mape"],
        "op_mape_with_training": training["ops"]["online_mape"],
        "op_mape_of_profile": serving["ops"]["profile_mape"],
        "op_mape_of_profile_with_training": training["ops"]["profile_mape"],
        "noise_floor": serving["ops"]["noise_floor"],
        "noise_floor_with_training": training["ops"]["noise_floor"],
        "response_mape": serving["responses"]["mape"],
        "response_mape_with_training": training["responses"]["mape"],
        "response_noise_floor": serving["responses"]["noise_floor"],
        "response_noise_floor_with_training": training["responses"]["noise_floor"],
        "interval_coverage": statistics.fmean(known) if known else None,
    }


def models(profile: profile_pb2.Profile) -> list[dict[str, Any]]:
    """Every form fitted to every operation, with its held-out error."""
    return [
        {
            "stage": fit.stage,
            "op": profile_pb2.OpKind.Name(fit.op).removeprefix("OP_KIND_").lower(),
            "model": fit.model,
            "mape": fit.mape,
            "r2": fit.r2,
            "chosen": fit.chosen,
        }
        for fit in profile.fits
    ]


def build(
    config: FidelityConfig,
    facts: Mapping[str, Any],
    repetitions: Sequence[Mapping[str, Any]],
    calibration: Mapping[str, Any],
    problems: Sequence[str],
    seconds_total: float,
) -> dict[str, Any]:
    """The summary: medians of the repetitions, and what they decide together."""
    others = disturbed(repetitions)
    quick = _QUICK if config.quick else ""
    warnings = [f"{quick} checks that everything works: its figures decide nothing"] if quick else []
    parts = [{key: value for key, value in item.items() if key != "points"} for item in repetitions]
    combined = combine([{**item, "simulator_vs_live": _by_name(item["simulator_vs_live"])} for item in parts])
    combined["simulator_vs_live"] = list(combined["simulator_vs_live"].values())
    return {
        **facts,
        "seed": config.seed,
        "repetitions": len(repetitions),
        **combined,
        "calibration": dict(calibration),
        "claims": [*verdicts(repetitions, quick or others), *of_calibration(calibration, quick)],
        "warnings": [*warnings, *([others] if others else [])],
        "problems": list(problems),
        "config": config.to_json(),
        "seconds_total": round(seconds_total, 1),
    }


def disturbed(repetitions: Sequence[Mapping[str, Any]]) -> str:
    """Why the figures say little; empty: nothing else used the machine."""
    shares = [
        run["cpu_share"].get(OTHERS, 0.0)
        for item in repetitions
        for run in (*item["real"].values(), *item["simulator_vs_live"])
    ]
    worst = max(shares, default=0.0)
    return f"other programs used up to {100 * worst:.0f} % of the CPU" if worst > _MAX_OTHERS else ""


def _by_name(entries: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {entry["workload"]: entry for entry in entries}
