"""How fast predictions learn and drift is noticed: `NodeCosts` fed with drawn operations of a device that is known.

Every case is one operation with one latency form, drawn sizes, lognormal noise and outliers; all of it from the seed.
`python -m bench.fidelity.calibration` prints the study.
"""

import argparse
import json
import math
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from services.latency import LatencyModel, LatencyTable, NodeLatency, OpKind
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.costs import NodeCosts

#: Standard deviation of the logarithm of durations; every hundredth or so takes ten times as long.
NOISE = 0.1
OUTLIER_SHARE = 0.01
OUTLIER = 10.0

_LEARNING_OPS = 400
_STEADY_OPS = 1000
_SLOW_OPS = 400
SLOWDOWN = 1.3
_UNCHANGED_OPS = 10_000
#: Sizes that predictions are compared at.
_PROBES = 40
_GOOD_ENOUGH = 0.1

Size = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Case:
    """An operation: how it really scales, and the sizes it comes in, as (batch, length)."""

    name: str
    op: OpKind
    model: LatencyModel
    draw: Callable[[Random], Size]


def _prompt(random: Random) -> Size:
    return 1.0, float(round(min(4096.0, random.lognormvariate(5.5, 0.8))))


def _decode_batch(random: Random) -> Size:
    return float(random.choice((1, 2, 4, 8, 12, 16))), random.uniform(50.0, 1500.0)


def _same_batch(random: Random) -> Size:
    return 8.0, random.uniform(50.0, 1500.0)


def _microbatch(random: Random) -> Size:
    return 4.0, float(random.choice((128, 256, 384, 512)))


def _one(random: Random) -> Size:
    del random
    return 1.0, 1.0


_TABLE = LatencyTable(
    batches=(1, 4, 16), lengths=(64, 512, 2048), durations_s=(5e-3, 6e-3, 9e-3, 6e-3, 9e-3, 2e-2, 9e-3, 2e-2, 6e-2)
)
CASES = (
    Case("prefill, full", OpKind.PREFILL, LatencyModel("full", (2e-3, 1e-4, 1e-8)), _prompt),
    Case("prefill, quadratic", OpKind.PREFILL, LatencyModel("quadratic", (1e-7,)), _prompt),
    Case("decode, full_decode", OpKind.DECODE, LatencyModel("full_decode", (4e-3, 5e-4, 1e-6)), _decode_batch),
    # A coefficient of 0 has no value that another one could be counted in.
    Case("prefill, full without a square", OpKind.PREFILL, LatencyModel("full", (2e-3, 1e-4, 0.0)), _prompt),
    Case("decode, flat in context", OpKind.DECODE, LatencyModel("full_decode", (4e-3, 5e-4, 0.0)), _decode_batch),
    Case("decode, one batch", OpKind.DECODE, LatencyModel("full_decode", (4e-3, 5e-4, 1e-6)), _same_batch),
    Case("decode, tabulated", OpKind.DECODE, LatencyModel("tabulated", (), table=_TABLE), _decode_batch),
    Case("train_backward, affine", OpKind.TRAIN_BACKWARD, LatencyModel("affine", (2e-3, 1e-4)), _microbatch),
    Case("optimizer_step, constant", OpKind.OPTIMIZER_STEP, LatencyModel("constant", (2e-2,)), _one),
)
#: By what the coefficients are wrong at the start; a form with fewer takes the first ones.
WRONG = {
    "all x2": (2.0, 2.0, 2.0),
    "all /2": (0.5, 0.5, 0.5),
    "x2 and /2": (2.0, 0.5, 2.0),
    "/2 and x2": (0.5, 2.0, 0.5),
}


class StudyStopped(Exception):
    """The study was told to stop before it ended."""


def calibration_study(num_seeds: int = 20, stop: threading.Event | None = None) -> dict[str, Any]:
    """Operations until coefficients that are wrong by 2 predict within 10 %, and until a device that became 30 % slower
    raises the alarm and is predicted within 10 % again.

    `ops_to_10pct`, `alarm_after_ops`, `followed_after_ops`: medians over seeds of the worst case; `..._max`: of all
    runs. `false_alarms`: of an unchanged device, per 10,000 operations. `cases`: the medians behind them, with their
    ranges. None: some run did not get there at all.

    stop: looked at before every run, each of a second at most; once set, StudyStopped is raised.
    """
    seeds = partial(_seeds, stop)
    learning = [
        _summary(f"{case.name}, {name}", [ops_to_learn(case, factors, seed) for seed in seeds(num_seeds)])
        for case in CASES
        for name, factors in WRONG.items()
        if case.model.form != "tabulated" or len(set(factors)) == 1
    ]
    slow = {case.name: [ops_to_notice(case, seed) for seed in seeds(num_seeds)] for case in CASES}
    alarms = [_summary(name, [alarm for alarm, _ in runs]) for name, runs in slow.items()]
    followed = [_summary(name, [follows for _, follows in runs]) for name, runs in slow.items()]
    false_alarms = [num_false_alarms(case, seed) for case in CASES for seed in seeds(max(1, num_seeds // 4))]
    result: dict[str, Any] = {"seeds": num_seeds, "noise": NOISE, "outlier_share": OUTLIER_SHARE, "slowdown": SLOWDOWN}
    for name, rows in (("ops_to_10pct", learning), ("alarm_after_ops", alarms), ("followed_after_ops", followed)):
        result[name] = _worst(rows, "median")
        result[f"{name}_max"] = _worst(rows, "max")
    result["false_alarms"] = sum(false_alarms) / len(false_alarms)
    result["unchanged_ops"] = len(false_alarms) * _UNCHANGED_OPS
    result["cases"] = {"ops_to_10pct": learning, "alarm_after_ops": alarms, "followed_after_ops": followed}
    return result


def _seeds(stop: threading.Event | None, count: int) -> Iterator[int]:
    for seed in range(count):
        if stop is not None and stop.is_set():
            raise StudyStopped
        yield seed


def ops_to_learn(case: Case, factors: Sequence[float], seed: int) -> int | None:
    """Operations after which predictions stay within 10 % on average; None: they do not."""
    costs = _costs(case, factors)
    probes = _probes(case, seed)
    learnt = None
    for index, (size, real_s) in enumerate(_durations(case, seed, _LEARNING_OPS, 1.0)):
        costs.calibrate(0, case.op, *size, real_s)
        if _error(costs, case, probes, 1.0) > _GOOD_ENOUGH:
            learnt = None
        elif learnt is None:
            learnt = index + 1
    return learnt


def ops_to_notice(case: Case, seed: int) -> tuple[int | None, int | None]:
    """Operations of a device that became slower, to the alarm and until predictions stay within 10 %; None: not at all,
    or an alarm before."""
    costs = _costs(case, (1.0, 1.0, 1.0))
    probes = _probes(case, seed)
    for size, real_s in _durations(case, seed, _STEADY_OPS, 1.0):
        costs.calibrate(0, case.op, *size, real_s)
    alarm = followed = None
    came_early = bool(costs.changes)
    for index, (size, real_s) in enumerate(_durations(case, seed + 1_000_000, _SLOW_OPS, SLOWDOWN)):
        costs.calibrate(0, case.op, *size, real_s)
        if alarm is None and costs.changes and not came_early:
            alarm = index + 1
        if _error(costs, case, probes, SLOWDOWN) > _GOOD_ENOUGH:
            followed = None
        elif followed is None:
            followed = index + 1
    return alarm, followed


def num_false_alarms(case: Case, seed: int) -> int:
    """Alarms that begin in 10,000 operations of an unchanged device."""
    costs = _costs(case, (1.0, 1.0, 1.0))
    for size, real_s in _durations(case, seed, _UNCHANGED_OPS, 1.0):
        costs.calibrate(0, case.op, *size, real_s)
    return sum(change.active for change in costs.changes)


def _costs(case: Case, factors: Sequence[float]) -> NodeCosts:
    model = case.model
    if model.table is not None:
        durations_s = tuple(factors[0] * duration_s for duration_s in model.table.durations_s)
        model = LatencyModel("tabulated", (), table=LatencyTable(model.table.batches, model.table.lengths, durations_s))
    else:
        coefficients = zip(model.coefficients, factors, strict=False)
        model = LatencyModel(model.form, tuple(coefficient * factor for coefficient, factor in coefficients))
    return NodeCosts(NodeLatency(({case.op: model},)), CoreConfig().drift_band)


def _durations(case: Case, seed: int, num_ops: int, slowdown: float) -> Iterator[tuple[Size, float]]:
    random = Random(f"{case.name} {seed}")
    for _ in range(num_ops):
        size = case.draw(random)
        real_s = slowdown * case.model.predict_s(*size) * math.exp(random.gauss(0.0, NOISE))
        yield size, real_s * (OUTLIER if random.random() < OUTLIER_SHARE else 1.0)


def _probes(case: Case, seed: int) -> list[Size]:
    random = Random(f"{case.name} {seed} probes")
    return [case.draw(random) for _ in range(_PROBES)]


def _error(costs: NodeCosts, case: Case, probes: Sequence[Size], slowdown: float) -> float:
    return statistics.fmean(
        abs(costs.stage_s(0, case.op, *size) / (slowdown * case.model.predict_s(*size)) - 1.0) for size in probes
    )


def _summary(name: str, runs: Sequence[int | None]) -> dict[str, Any]:
    reached = [run for run in runs if run is not None]
    row: dict[str, Any] = {"case": name, "missed": len(runs) - len(reached)}
    missed = len(reached) < len(runs)
    row["median"] = None if missed else statistics.median(reached)
    row["min"], row["max"] = (None, None) if missed else (min(reached), max(reached))
    return row


def _worst(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows]
    return None if None in values else max(values)


def main() -> None:
    """Print the study as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity.calibration", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="repetitions of every case")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    print(json.dumps(calibration_study(args.seeds), indent=2))


if __name__ == "__main__":
    main()
