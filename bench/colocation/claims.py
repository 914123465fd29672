"""What has to hold, and whether it does. A miss is printed as a miss. Pure."""

from collections.abc import Mapping
from typing import Any

from bench.colocation.config import HALF, SUBJECT
from bench.report.verdict import decide

#: With two speeds the comparison is made at capacity, where every node counts.
_FULLEST = 1.0


def claims(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every claim with its value; a value of None was not measured."""
    half = {row["policy"]: row for row in found["rates"] if row["share"] == HALF}
    mine = half.get(SUBJECT)
    others = [row["safe_harvest"] for name, row in half.items() if name != SUBJECT]
    lost = None
    if mine is not None:
        lost = 100.0 * (max(row["slo_attainment_off"] for row in half.values()) - mine["slo_attainment"])
    fullest = max((row for row in found["heterogeneous"]["rates"] if row["trains"]), key=_fullness, default=None)
    gained = None if fullest is None else 100.0 * (fullest["per_node"] - fullest["averaged"])
    safe = None if mine is None else mine["safe_harvest"]
    return [
        _claim("safe_harvest", f"safe harvest of {SUBJECT} at half of capacity", safe, 0.80, at_least=True),
        _claim("safe_harvest_goal", "the same, the goal", safe, 0.90, at_least=True),
        _claim(
            "attainment_lost",
            "points of attainment that training costs there, against the best policy without training",
            lost,
            1.0,
            at_least=False,
        ),
        _claim(
            "over_baselines",
            "safe harvest there over that of the best baseline",
            None if safe is None or not others else (safe / max(others) if max(others) else float("inf")),
            1.0,
            at_least=True,
        ),
        _claim(
            "per_node",
            "points of attainment that coefficients per node gain over averaged ones, two speeds at capacity, training",
            gained,
            5.0,
            at_least=True,
        ),
    ]


def _fullness(row: Mapping[str, Any]) -> float:
    distance: float = abs(row["share"] - _FULLEST)
    return -distance


def _claim(name: str, text: str, value: float | None, threshold: float, *, at_least: bool) -> dict[str, Any]:
    return {
        "name": name,
        "text": text,
        "value": value,
        "threshold": threshold,
        "at_least": at_least,
        "verdict": decide([value], threshold, at_least=at_least),
    }


def line(claim: Mapping[str, Any]) -> str:
    """A claim in words."""
    value = "not measured" if claim["value"] is None else f"{claim['value']:.2f}"
    return f"{claim['text']}: {value} ({limit(claim)})"


def limit(claim: Mapping[str, Any]) -> str:
    """What it is held against."""
    return f"{'at least' if claim['at_least'] else 'at most'} {claim['threshold']:g}"
