"""What must hold, and whether it does. A miss is printed as a miss. Pure."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.fidelity.compare import AGREEMENT
from bench.report.verdict import decide

Figure = Callable[[Mapping[str, Any]], float | None]


@dataclass(frozen=True, slots=True)
class Claim:
    """A figure of a repetition that must be at least, or at most, the threshold."""

    name: str
    text: str
    figure: Figure
    threshold: float
    form: str
    at_least: bool = False


def _op_excess(key: str, floor: str) -> Figure:
    """Error of the operations over what it may be: 8 %, or the noise floor and three points."""

    def figure(repetition: Mapping[str, Any]) -> float | None:
        error, noise = repetition["prediction"][key], repetition["prediction"][floor]
        return None if error is None else error - max(0.08, (noise or 0.0) + 0.03)

    return figure


def _prediction(key: str) -> Figure:
    def figure(repetition: Mapping[str, Any]) -> float | None:
        value: float | None = repetition["prediction"][key]
        return value

    return figure


def _worst(key: str) -> Figure:
    """Largest distance of simulator and live cluster over the workloads; None when one has no value."""

    def figure(repetition: Mapping[str, Any]) -> float | None:
        values: list[float | None] = [entry[key] for entry in repetition["simulator_vs_live"]]
        known = [abs(value) for value in values if value is not None]
        return max(known) if known and len(known) == len(values) else None

    return figure


def _studied(key: str) -> Figure:
    def figure(study: Mapping[str, Any]) -> float | None:
        value: float | None = study[key]
        return value

    return figure


_POINTS = "{:+.1%}"
CLAIMS = (
    Claim(
        "op_error",
        "error of operations from 5 ms, above 8 % or the noise floor + 3 points",
        _op_excess("op_mape", "noise_floor"),
        0.0,
        _POINTS,
    ),
    Claim(
        "op_error_with_training",
        "the same with training beside",
        _op_excess("op_mape_with_training", "noise_floor_with_training"),
        0.0,
        _POINTS,
    ),
    Claim("response_error", "error of the predicted time to first token", _prediction("response_mape"), 0.10, "{:.1%}"),
    Claim(
        "response_error_with_training",
        "the same with training beside",
        _prediction("response_mape_with_training"),
        0.12,
        "{:.1%}",
    ),
    Claim(
        "coverage",
        "operations within their 90 % intervals",
        _prediction("interval_coverage"),
        0.85,
        "{:.1%}",
        at_least=True,
    ),
    Claim("coverage_not_wider", "the same: no wider than needed", _prediction("interval_coverage"), 0.95, "{:.1%}"),
    Claim(
        "simulator_attainment",
        "simulator against live cluster, attainment in the worst workload",
        _worst("slo_attainment_points"),
        AGREEMENT["slo_attainment_points"],
        "{:.1f} points",
    ),
    Claim(
        "simulator_throughput",
        "the same, tokens per second",
        _worst("throughput_pct"),
        AGREEMENT["throughput_pct"],
        "{:.1f} %",
    ),
    Claim("simulator_ttft", "the same, TTFT p95", _worst("ttft_p95_pct"), AGREEMENT["ttft_p95_pct"], "{:.1f} %"),
)


#: Of the calibration study, whose devices are drawn: nothing of the machine is in them.
_STUDIED = (
    Claim(
        "calibration",
        "operations until coefficients wrong by 2 predict within 10 %, slowest case",
        _studied("ops_to_10pct_max"),
        200.0,
        "{:.0f}",
    ),
    Claim(
        "drift_alarm",
        "operations until a device 30 % slower raises the alarm, slowest case",
        _studied("alarm_after_ops_max"),
        100.0,
        "{:.0f}",
    ),
)


def of_calibration(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What must hold of it."""
    return [_judged(claim, [study], "") for claim in _STUDIED]


def verdicts(repetitions: Sequence[Mapping[str, Any]], doubt: str = "") -> list[dict[str, Any]]:
    """Every claim with its value per repetition, their median and the verdict: held, missed or unresolved.

    doubt: why figures of this machine decide nothing; empty: they do.
    """
    return [_judged(claim, repetitions, doubt) for claim in CLAIMS]


def _judged(claim: Claim, repetitions: Sequence[Mapping[str, Any]], doubt: str) -> dict[str, Any]:
    values = [claim.figure(repetition) for repetition in repetitions]
    known = [value for value in values if value is not None]
    verdict = decide(values, claim.threshold, at_least=claim.at_least)
    return {
        "name": claim.name,
        "claim": claim.text,
        "threshold": claim.threshold,
        "direction": "at least" if claim.at_least else "at most",
        "values": values,
        "median": statistics.median(known) if known else None,
        "shown": claim.form.format(statistics.median(known)) if known else "not measured",
        "limit": claim.form.format(claim.threshold),
        "verdict": "unresolved" if doubt else verdict,
        "reason": doubt,
    }
