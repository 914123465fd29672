"""Time of one scheduling decision: `python -m bench.decision`.

A decision is one `step` with an arriving request, timed with nothing else in between. Every node trains (its window is
full), some requests are live, and the request that was placed ends again before the next one is timed. Writes
`out/bench/decision.json`.
"""

import argparse
import gc
import json
import statistics
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.machine import git_commit, machine
from services.latency import LatencyModel, NodeLatency, OpKind
from services.scheduler.core.policies import POLICIES
from services.scheduler.core.scheduler import SchedulerCore
from services.scheduler.core.types import (
    Assign,
    CoreConfig,
    InferenceTask,
    NodeJoined,
    NodeSpec,
    SloTarget,
    TaskArrived,
    TaskEnded,
    TrainingTask,
)

TARGET_P50_US = 50.0
NUM_STAGES = 2
#: (nodes, live requests) measured: one sweep over the load, one over the cluster.
POINTS = ((4, 0), (4, 4), (4, 16), (4, 64), (4, 256), (1, 16), (16, 64), (100, 400))
GAP_S = 0.01


@dataclass(frozen=True, slots=True)
class Row:
    """Durations of one point over all repetitions, microseconds."""

    policy: str
    nodes: int
    committed: int
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


def prepared_core(policy: str, nodes: int, committed: int) -> SchedulerCore:
    """A core with `nodes` nodes in full training and `committed` live requests."""
    config = CoreConfig(
        policy=policy,
        default_slo=SloTarget(ttft_s=1.0, tpot_s=0.1),
        max_waiting_training=8 * nodes,
        max_hold_back_s=0.0,
    )
    core = SchedulerCore(config)
    for index in range(nodes):
        core.step(0.0, NodeJoined(NodeSpec(f"node-{index:03d}", NUM_STAGES, latency(), max_inflight_inference=1024)))
    for index in range(4 * nodes):
        core.step(0.0, TaskArrived(TrainingTask(f"m{index}", 0.0, "job", 1, 512)))
    for index in range(committed):
        core.step(0.0, TaskArrived(request(f"live{index}", 0.0, index)))
    return core


def request(task_id: str, now_s: float, index: int) -> InferenceTask:
    """A request whose prompt length varies with its index."""
    return InferenceTask(task_id, now_s, 64 + 37 * index % 448, 128)


def measure(policy: str, nodes: int, committed: int, decisions: int) -> list[float]:
    """Durations of single decisions, microseconds."""
    core = prepared_core(policy, nodes, committed)
    durations_us = []
    for index in range(decisions):
        now_s = GAP_S * (index + 1)
        event = TaskArrived(request(f"r{index}", now_s, index))
        begin_ns = time.perf_counter_ns()
        commands = core.step(now_s, event)
        durations_us.append((time.perf_counter_ns() - begin_ns) / 1e3)
        (command,) = commands
        if not isinstance(command, Assign):
            raise SystemExit(f"{policy}: expected an Assign, got {command!r}")
        core.step(now_s, TaskEnded(command.task_id, command.node_id, ok=True, output_tokens=32))
    return durations_us


def run(decisions: int, repeat: int) -> list[Row]:
    """Measure every point of every policy; repetitions are interleaved so that drift of the machine hits all alike."""
    samples: dict[tuple[str, int, int], list[list[float]]] = {}
    gc.disable()
    try:
        for _ in range(repeat):
            for policy in sorted(POLICIES):
                for nodes, committed in POINTS:
                    gc.collect()
                    durations_us = measure(policy, nodes, committed, decisions)
                    samples.setdefault((policy, nodes, committed), []).append(durations_us[decisions // 10 :])
    finally:
        gc.enable()
    return [_row(key, repetitions) for key, repetitions in samples.items()]


def _row(key: tuple[str, int, int], repetitions: list[list[float]]) -> Row:
    medians = [statistics.median(durations_us) for durations_us in repetitions]
    every = sorted(value for durations_us in repetitions for value in durations_us)
    return Row(
        *key,
        decisions=len(every),
        p50_us=statistics.median(medians),
        p50_us_min=min(medians),
        p50_us_max=max(medians),
        p99_us=every[int(0.99 * (len(every) - 1))],
        decisions_per_s=1e6 * len(every) / sum(every),
    )


def report(rows: list[Row], args: argparse.Namespace, started_at: str) -> dict[str, Any]:
    """The summary, and whether the target holds."""
    at_four = [row.p50_us for row in rows if row.nodes == 4]
    return {
        "git_commit": git_commit(),
        "started_at": started_at,
        "machine": machine(),
        "config": {"decisions": args.decisions, "repeat": args.repeat, "num_stages": NUM_STAGES, "training_window": 4},
        "seed": 0,
        "scheduler": [asdict(row) for row in rows],
        "target": {
            "nodes": 4,
            "p50_us": TARGET_P50_US,
            "worst_p50_us": max(at_four),
            "met": max(at_four) <= TARGET_P50_US,
        },
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
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    rows = run(args.decisions, args.repeat)
    print(f"{'policy':<16}{'nodes':>6}{'committed':>11}{'p50 us':>9}{'(min-max)':>16}{'p99 us':>9}")
    for row in rows:
        spread = f"({row.p50_us_min:.1f}-{row.p50_us_max:.1f})"
        print(f"{row.policy:<16}{row.nodes:>6}{row.committed:>11}{row.p50_us:>9.1f}{spread:>16}{row.p99_us:>9.1f}")
    summary = report(rows, args, started_at)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"4 nodes: worst median {summary['target']['worst_p50_us']:.1f} us (target {TARGET_P50_US:.0f}); {args.out}")


if __name__ == "__main__":
    main()
