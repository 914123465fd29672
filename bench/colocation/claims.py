"""What has to hold, and whether it does. A miss is printed as a miss. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.colocation.config import HALF, SUBJECT
from bench.fidelity.clock import LIMIT
from bench.report.verdict import decide

#: p99 of the clock slip of a live cluster that keeps time, % of an operation.
MOST_SLIP = 100.0 * LIMIT
#: Of every claim after a quick run.
_UNDECIDED = {"verdict": "unresolved", "reason": "a quick run"}


def claims(found: Mapping[str, Any], *, is_quick: bool = False) -> list[dict[str, Any]]:
    """Every claim with its value; a value of None was not measured. is_quick: none is decided."""
    judged = _judged(found)
    return [{**claim, **_UNDECIDED} for claim in judged] if is_quick else judged


def _judged(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    half = {row["policy"]: row for row in found["rates"] if row["share"] == HALF}
    mine = half.get(SUBJECT)
    others = [row["safe_harvest"] for name, row in half.items() if name != SUBJECT]
    lost = None
    if mine is not None:
        lost = 100.0 * (max(row["slo_attainment_off"] for row in half.values()) - mine["slo_attainment"])
    speeds = found["heterogeneous"]
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
            "points of attainment that coefficients per node gain over averaged ones (two speeds, capacity, training)",
            100.0 * (speeds["per_node"] - speeds["averaged"]),
            5.0,
            at_least=True,
            by_seed=[100.0 * gain for gain in speeds["gains"]],
        ),
        *_live_claims(found.get("live")),
    ]


def _live_claims(live: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if live is None or SUBJECT not in live["policies"]:
        return []
    mine = live["policies"][SUBJECT]["live"]
    lost = 100.0 * (mine["slo_attainment_off"] - mine["slo_attainment"])
    safe = mine["safe_harvest"]
    slip = 100.0 * live["clock_slip_p99_frac"]
    scale = [
        _claim(
            "time_scale",
            "times as slow does a live emulated cluster keep time on this machine",
            live["time_scale"],
            4.0,
            at_least=False,
        ),
    ]
    return [
        # At a scale that does not keep time it says nothing; the clock slip does.
        *(scale if slip <= MOST_SLIP else []),
        _claim("live_safe_harvest", "safe harvest on the live emulated cluster", safe, 0.80, at_least=True),
        _claim("live_attainment_lost", "points of attainment that training costs on it", lost, 1.0, at_least=False),
        _claim(
            "clock_slip",
            f"p99 clock slip on it, % of operations {live['time_scale']:g} times as long",
            slip,
            MOST_SLIP,
            at_least=False,
        ),
    ]


def _claim(
    name: str,
    text: str,
    value: float | None,
    threshold: float,
    *,
    at_least: bool,
    by_seed: Sequence[float] = (),
) -> dict[str, Any]:
    """by_seed: decides where given: what holds with some seeds only is unresolved."""
    verdict = decide(list(by_seed) or [value], threshold, at_least=at_least)
    reason = "" if verdict != "unresolved" else "not measured" if value is None else "the seeds disagree"
    return {
        "name": name,
        "text": text,
        "value": value,
        "threshold": threshold,
        "at_least": at_least,
        "verdict": verdict,
        "reason": reason,
    }


def line(claim: Mapping[str, Any]) -> str:
    """A claim in words."""
    value = "–" if claim["value"] is None else f"{claim['value']:.2f}"
    return f"{claim['text']}: {value} ({limit(claim)})"


def limit(claim: Mapping[str, Any]) -> str:
    """What it is held against, and why nothing was decided."""
    held_against = f"{'at least' if claim['at_least'] else 'at most'} {claim['threshold']:g}"
    return ", ".join(filter(None, (held_against, claim["reason"])))
