"""Time of one scheduling decision: `python -m bench.decision`.

A decision is one `step` with an arriving request, timed with nothing else in between. Every node trains (its window is
full), some requests are live, some tasks ended long ago, and the request that was placed ends again before the next one
is timed. Writes `out/bench/decision.json` and a page with the growth over live requests, nodes and history.
"""

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench import decision_page
from bench.report.summary import run_facts, write_summary
from services.latency import LatencyModel, NodeLatency, OpKind
from services.scheduler.core.commands import Assign
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import NodeJoined, TaskArrived, TaskEnded
from services.scheduler.core.node_spec import NodeSpec
from services.scheduler.core.policies import POLICIES
from services.scheduler.core.scheduler import SchedulerCore
from services.scheduler.core.tasks import InferenceTask, SloTarget, TrainingTask

NUM_STAGES = 2
#: LeMix with an option that is not its default; the targets are for the defaults.
AHEAD = "lemix, fast_forward"
VARIANTS = (*sorted(POLICIES), AHEAD)


class Place(NamedTuple):
    """Nodes, live requests, and tasks that ended before."""

    nodes: int
    committed: int
    finished: int = 0


#: One sweep over the load, one over the cluster, one over the history.
LOADS = (Place(4, 0), Place(4, 16), Place(4, 64), Place(4, 256))
CLUSTERS = (Place(1, 10), Place(4, 40), Place(16, 160), Place(100, 1000))
HISTORIES = (Place(4, 16), Place(4, 16, 1_000), Place(4, 16, 10_000))
POINTS = tuple(dict.fromkeys((*LOADS, *CLUSTERS, *HISTORIES)))


def _is_one_of(places: Sequence[Place]) -> Callable[[Mapping[str, Any]], bool]:
    return lambda row: (row["nodes"], row["committed"], row["finished"]) in places


SWEEPS = (
    ("live requests (4 nodes)", "committed", _is_one_of(LOADS)),
    ("nodes (10 live requests on each)", "nodes", _is_one_of(CLUSTERS)),
    ("tasks that ended before (4 nodes, 16 live requests)", "finished", _is_one_of(HISTORIES)),
)


class Target(NamedTuple):
    """Upper limits for the slowest policy, microseconds."""

    place: Place
    p50_us: float
    p99_us: float = math.inf


TARGETS = (Target(LOADS[2], 50.0), Target(CLUSTERS[-1], 500.0, 2000.0))
GAP_S = 0.01


@dataclass(frozen=True, slots=True)
class Row:
    """Durations of one point over all repetitions, microseconds."""

    policy: str
    nodes: int
    committed: int
    finished: int
    decisions: int
    p50_us: float
    #: Smallest and largest median of a repetition.
    p50_us_min: float
    p50_us_max: float
    p99_us: float
    decisions_per_s: float


def latency() -> NodeLatency:
    """Profile with the richest forms: the most arithmetic per prediction."""
    models = {
        OpKind.PREFILL: LatencyModel("full", (0.002, 1e-4, 1e-8)),
        OpKind.DECODE: LatencyModel("full_decode", (0.004, 5e-4, 1e-6)),
        OpKind.TRAIN_FORWARD: LatencyModel("full", (0.002, 1e-4, 1e-8)),
        OpKind.TRAIN_BACKWARD: LatencyModel("full", (0.004, 2e-4, 2e-8)),
        OpKind.OPTIMIZER_STEP: LatencyModel("constant", (0.005,)),
    }
    return NodeLatency((models,) * NUM_STAGES)


def prepared_core(variant: str, nodes: int, committed: int, finished: int) -> SchedulerCore:
    """A core with `nodes` nodes in full training, `committed` live requests and `finished` that ended.

    variant: a policy, or LeMix and its forecast.
    """
    policy, _, forecast = variant.partition(", ")
    config = CoreConfig(
        policy=policy,
        policy_options={"forecast": forecast} if forecast else {},
        default_slo=SloTarget(ttft_s=1.0, tpot_s=0.1),
        max_waiting_training=8 * nodes,
        max_hold_back_s=0.0,
    )
    core = SchedulerCore(config)
    for index in range(nodes):
        core.step(0.0, NodeJoined(NodeSpec(f"node-{index:03d}", NUM_STAGES, latency(), max_inflight_inference=1024)))
    for index in range(4 * nodes):
        core.step(0.0, TaskArrived(TrainingTask(f"m{index}", 0.0, "job", 1, 512)))
    for index in range(finished):
        serve(core, 0.0, f"old{index}", index)
    for index in range(committed):
        core.step(0.0, TaskArrived(request(f"live{index}", 0.0, index)))
    return core


def request(task_id: str, now_s: float, index: int) -> InferenceTask:
    """A request whose prompt length varies with its index."""
    return InferenceTask(task_id, now_s, 64 + 37 * index % 448, 128)


def serve(core: SchedulerCore, now_s: float, task_id: str, index: int) -> float:
    """Place a request and end it; returns how long the decision took, microseconds."""
    event = TaskArrived(request(task_id, now_s, index))
    begin_ns = time.perf_counter_ns()
    commands = core.step(now_s, event)
    duration_us = (time.perf_counter_ns() - begin_ns) / 1e3
    (command,) = commands
    if not isinstance(command, Assign):
        raise SystemExit(f"expected an Assign, got {command!r}")
    core.step(now_s, TaskEnded(command.task_id, command.node_id, ok=True, output_tokens=32))
    return duration_us


def measure(policy: str, place: Place, decisions: int) -> list[float]:
    """Durations of single decisions, microseconds."""
    core = prepared_core(policy, *place)
    return [serve(core, GAP_S * (index + 1), f"r{index}", index) for index in range(decisions)]


def run(decisions: int, repeat: int) -> list[Row]:
    """Measure every point of every policy; repetitions are interleaved so that drift of the machine hits all alike."""
    samples: dict[tuple[str, Place], list[list[float]]] = {}
    gc.disable()
    try:
        for _ in range(repeat):
            for policy in VARIANTS:
                for place in POINTS:
                    gc.collect()
                    durations_us = measure(policy, place, decisions)
                    samples.setdefault((policy, place), []).append(durations_us[decisions // 10 :])
    finally:
        gc.enable()
    return [_row(policy, place, repetitions) for (policy, place), repetitions in samples.items()]


def _row(policy: str, place: Place, repetitions: list[list[float]]) -> Row:
    medians = [statistics.median(durations_us) for durations_us in repetitions]
    every = sorted(value for durations_us in repetitions for value in durations_us)
    return Row(
        policy,
        *place,
        decisions=len(every),
        p50_us=statistics.median(medians),
        p50_us_min=min(medians),
        p50_us_max=max(medians),
        p99_us=every[int(0.99 * (len(every) - 1))],
        decisions_per_s=1e6 * len(every) / sum(every),
    )


def report(rows: list[Row], args: argparse.Namespace) -> dict[str, Any]:
    """What the summary tells of this benchmark, and whether the targets hold."""
    return {
        "config": {"decisions": args.decisions, "repeat": args.repeat, "num_stages": NUM_STAGES, "training_window": 4},
        "seed": 0,
        "scheduler": [asdict(row) for row in rows],
        "targets": [judge(target, rows) for target in TARGETS],
    }


def judge(target: Target, rows: list[Row]) -> dict[str, Any]:
    """The slowest policy at the target's place against its limits; None: no limit."""
    there = [row for row in rows if (row.nodes, row.committed, row.finished) == target.place and row.policy in POLICIES]
    p50_us, p99_us = max(row.p50_us for row in there), max(row.p99_us for row in there)
    return {
        **target.place._asdict(),
        "p50_us": target.p50_us,
        "p99_us": None if target.p99_us == math.inf else target.p99_us,
        "worst_p50_us": p50_us,
        "worst_p99_us": p99_us,
        "met": p50_us <= target.p50_us and p99_us <= target.p99_us,
    }


def main() -> None:
    """Measure, print the table, write the summary."""
    parser = argparse.ArgumentParser(description="Time of one scheduling decision.")
    parser.add_argument("--decisions", type=int, default=1000, help="decisions per point and repetition")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions")
    parser.add_argument("--out", type=Path, default=Path("out/bench/decision.json"))
    args = parser.parse_args()
    if args.decisions < 20 or args.repeat < 1:
        parser.error("--decisions must be at least 20 and --repeat at least 1")
    facts = run_facts()
    rows = run(args.decisions, args.repeat)
    columns = f"{'policy':<20}{'nodes':>6}{'committed':>11}{'finished':>10}"
    print(f"{columns}{'p50 us':>9}{'(min-max)':>16}{'p99 us':>9}")
    for row in rows:
        spread = f"({row.p50_us_min:.1f}-{row.p50_us_max:.1f})"
        place = f"{row.policy:<20}{row.nodes:>6}{row.committed:>11}{row.finished:>10}"
        print(f"{place}{row.p50_us:>9.1f}{spread:>16}{row.p99_us:>9.1f}")
    summary = facts | report(rows, args)
    for target in summary["targets"]:
        verdict = "met" if target["met"] else "missed"
        place = f"{target['nodes']} nodes, {target['committed']} committed"
        p50, p99 = f"p50 {target['worst_p50_us']:.1f} us", f"p99 {target['worst_p99_us']:.1f} us"
        print(f"{place}: slowest policy {p50} (target {target['p50_us']:.0f}), {p99}: {verdict}")
    write_summary(args.out, summary, decision_page.render(summary, SWEEPS))


if __name__ == "__main__":
    main()
