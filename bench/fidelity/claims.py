"""What must hold, and whether it does. A miss is printed as a miss. Pure."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.fidelity.compare import AGREEMENT
from bench.fidelity.report import percent
from bench.report.verdict import decide

Figure = Callable[[Mapping[str, Any]], float | None]
#: Noise floors get so much more, as a share: no predictor reaches them exactly.
_ABOVE_FLOOR = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A figure of a repetition that must lie within bounds.

    floor: noise that the figure may exceed by 3 points, where that is more than `at_most`.
    """

    name: str
    text: str
    figure: Figure
    form: Callable[[float], str]
    limit: str
    at_least: float | None = None
    at_most: float | None = None
    floor: Figure | None = None

    def highest(self, repetition: Mapping[str, Any]) -> float | None:
        """What the figure of this repetition may be at most; None: anything."""
        noise = None if self.floor is None else self.floor(repetition)
        if self.at_most is None or noise is None:
            return self.at_most
        return max(self.at_most, noise + _ABOVE_FLOOR)

    def excess(self, repetition: Mapping[str, Any]) -> float | None:
        """How far outside its bounds the figure is; not above 0: within. None: not measured."""
        value, highest = self.figure(repetition), self.highest(repetition)
        if value is None:
            return None
        over = [] if highest is None else [value - highest]
        under = [] if self.at_least is None else [self.at_least - value]
        return max(over + under)


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


def _points(value: float) -> str:
    return f"{value:.1f} points"


def _in_percent(value: float) -> str:
    return f"{value:.1f} %"


def _count(value: float) -> str:
    return f"{value:.0f}"


_OP_ERROR, _OP_LIMIT = 0.08, "at most 8 %, or floor + 3 points"
CLAIMS = (
    Claim(
        name="op_error",
        text="error of predicted operations (5 ms or longer), serving alone",
        figure=_prediction("op_mape"),
        floor=_prediction("noise_floor"),
        form=percent,
        limit=_OP_LIMIT,
        at_most=_OP_ERROR,
    ),
    Claim(
        name="op_error_with_training",
        text="error of predicted operations (5 ms or longer), training beside",
        figure=_prediction("op_mape_with_training"),
        floor=_prediction("noise_floor_with_training"),
        form=percent,
        limit=_OP_LIMIT,
        at_most=_OP_ERROR,
    ),
    Claim(
        name="response_error",
        text="error of the predicted time to first token, serving alone",
        figure=_prediction("response_mape"),
        form=percent,
        limit="at most 10 %",
        at_most=0.10,
    ),
    Claim(
        name="response_error_with_training",
        text="error of the predicted time to first token, training beside",
        figure=_prediction("response_mape_with_training"),
        form=percent,
        limit="at most 12 %",
        at_most=0.12,
    ),
    Claim(
        name="coverage",
        text="operations within their 90 % intervals",
        figure=_prediction("interval_coverage"),
        form=percent,
        limit="85 to 95 %",
        at_least=0.85,
        at_most=0.95,
    ),
    Claim(
        name="simulator_attainment",
        text="simulator against live cluster, SLO attainment in the worst workload",
        figure=_worst("slo_attainment_points"),
        form=_points,
        limit=f"at most {AGREEMENT['slo_attainment_points']:g} points",
        at_most=AGREEMENT["slo_attainment_points"],
    ),
    Claim(
        name="simulator_throughput",
        text="simulator against live cluster, tokens per second in the worst workload",
        figure=_worst("throughput_pct"),
        form=_in_percent,
        limit=f"at most {AGREEMENT['throughput_pct']:g} %",
        at_most=AGREEMENT["throughput_pct"],
    ),
    Claim(
        name="simulator_ttft",
        text="simulator against live cluster, TTFT p95 in the worst workload",
        figure=_worst("ttft_p95_pct"),
        form=_in_percent,
        limit=f"at most {AGREEMENT['ttft_p95_pct']:g} %",
        at_most=AGREEMENT["ttft_p95_pct"],
    ),
)


#: Of the calibration study, whose devices are drawn: nothing of the machine is in them.
_STUDIED = (
    Claim(
        name="calibration",
        text="operations until coefficients wrong by 2 predict within 10 %, slowest case",
        figure=_studied("ops_to_10pct_max"),
        form=_count,
        limit="at most 200",
        at_most=200.0,
    ),
    Claim(
        name="drift_alarm",
        text="operations until a device 30 % slower raises the alarm, slowest case",
        figure=_studied("alarm_after_ops_max"),
        form=_count,
        limit="at most 100",
        at_most=100.0,
    ),
)


def of_calibration(study: Mapping[str, Any], doubt: str = "") -> list[dict[str, Any]]:
    """What must hold of it."""
    return [_judged(claim, [study], doubt) for claim in _STUDIED]


def verdicts(repetitions: Sequence[Mapping[str, Any]], doubt: str = "") -> list[dict[str, Any]]:
    """Every claim with its value per repetition, their median and the verdict: held, missed or unresolved.

    doubt: why figures of this run decide nothing; empty: they do.
    """
    return [_judged(claim, repetitions, doubt) for claim in CLAIMS]


def _judged(claim: Claim, repetitions: Sequence[Mapping[str, Any]], doubt: str) -> dict[str, Any]:
    values = [claim.figure(repetition) for repetition in repetitions]
    median = _median(values)
    floor = None if claim.floor is None else _median([claim.floor(repetition) for repetition in repetitions])
    verdict = decide([claim.excess(repetition) for repetition in repetitions], 0.0, at_least=False)
    reason = doubt or (_why_unresolved(values) if verdict == "unresolved" else "")
    return {
        "name": claim.name,
        "claim": claim.text,
        "at_least": claim.at_least,
        "at_most": _median([claim.highest(repetition) for repetition in repetitions]),
        "limit": claim.limit,
        "values": values,
        "median": median,
        "shown": "not measured" if median is None else claim.form(median),
        "note": "" if floor is None else f"noise floor {claim.form(floor)}",
        "verdict": "unresolved" if doubt else verdict,
        "reason": reason,
    }


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _why_unresolved(values: Sequence[float | None]) -> str:
    if all(value is None for value in values):
        return "not measured"
    return "not measured in every repetition" if None in values else "repetitions disagree"
