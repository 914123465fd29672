"""CPU time of the control plane: `python -m bench.control`.

Emulated nodes take the time of a small model and no CPU for it, so what is left is the price of moving requests, tokens
and operations through Redis, scheduler, node agents (with the bookkeeping of their emulated stages) and gateway. A
fresh cluster per repetition gets a fixed load: requests alone, then training alone; what the processes use without any
load is taken off. Writes `out/bench/control.json`.
"""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.control.cluster import ControlConfig, Phase, measure
from bench.live.errors import LiveError
from bench.report.summary import run_facts, write_summary
from deploy.local.cluster import ClusterError

#: Processes in the order of a request's way.
HOPS = ("gateway", "redis", "scheduler", "node_agents")
TOTAL = "total"

#: Smallest, median and largest of the repetitions, milliseconds.
Spread = tuple[float, float, float]


def cost_ms(phases: Sequence[Phase], name: str) -> dict[str, float]:
    """CPU milliseconds by hop and their sum, per request (phase `requests`) or operation (phase `training`), less what
    the same process uses idle."""
    by_name = {phase.name: phase for phase in phases}
    idle, busy = by_name["idle"], by_name[name]
    count = busy.requests or sum(busy.ops.values())
    if not count:
        raise LiveError(f"nothing ran in the phase {name}")
    cost = {
        hop: 1e3 * (busy.cpu_s.get(hop, 0.0) - idle.cpu_s.get(hop, 0.0) / idle.wall_s * busy.wall_s) / count
        for hop in HOPS
    }
    return cost | {TOTAL: sum(cost.values())}


def spreads(repetitions: Sequence[Sequence[Phase]], name: str) -> dict[str, Spread]:
    """`cost_ms` over the repetitions."""
    costs = [cost_ms(phases, name) for phases in repetitions]
    values = {hop: [cost[hop] for cost in costs] for hop in (*HOPS, TOTAL)}
    return {hop: (min(found), statistics.median(found), max(found)) for hop, found in values.items()}


def report(repetitions: Sequence[Sequence[Phase]]) -> dict[str, Any]:
    """What the summary tells of this benchmark."""
    requests, ops = spreads(repetitions, "requests"), spreads(repetitions, "training")
    return {
        "gateway": {"cpu_ms_per_request": {hop: spread[1] for hop, spread in requests.items()}},
        "per_request_ms": requests,
        "per_training_op_ms": ops,
        "repetitions": [[asdict(phase) for phase in phases] for phases in repetitions],
    }


def show(summary: dict[str, Any], repetitions: Sequence[Sequence[Phase]]) -> None:
    """The table."""
    print(f"{'CPU milliseconds':<14}{'per request':>24}{'per training operation':>34}")
    for hop in (*HOPS, TOTAL):
        cells = [summary[key][hop] for key in ("per_request_ms", "per_training_op_ms")]
        shown = [f"{middle:.2f} ({low:.2f}-{high:.2f})" for low, middle, high in cells]
        print(f"{hop:<16}{shown[0]:>24}{shown[1]:>34}")
    for phase in repetitions[0]:
        ops = ", ".join(f"{count} {kind}" for kind, count in sorted(phase.ops.items())) or "none"
        print(
            f"{phase.name}: {phase.requests} requests, {phase.tokens} tokens in {phase.wall_s:.1f} s; operations: {ops}"
        )


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.control", description="CPU time of the control plane.")
    parser.add_argument("--repeat", type=int, default=3, help="clusters that are measured, one after the other")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a phase")
    parser.add_argument("--rate", type=float, default=6.5, help="requests per second")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--stages", type=int, default=1, help="stages per node")
    parser.add_argument("--out", type=Path, default=Path("out/bench/control.json"))
    return parser


def main() -> int:
    """Measure, print the table, write the summary. Exit code 1: a cluster or a request failed."""
    parser = build_parser()
    args = parser.parse_args()
    for option in ("repeat", "seconds", "rate", "nodes", "stages"):
        if getattr(args, option) <= 0:
            parser.error(f"--{option} must be above 0")
    facts = run_facts()
    repetitions = []
    try:
        for number in range(args.repeat):
            config = ControlConfig(
                nodes=args.nodes,
                stages=args.stages,
                rate=args.rate,
                seconds=args.seconds,
                seed=number,
                directory=args.out.with_suffix(""),
            )
            repetitions.append(asyncio.run(measure(config)))
        summary = {"config": vars(args) | {"out": str(args.out)}} | report(repetitions)
    except (LiveError, ClusterError) as error:
        print(f"control: {error}", file=sys.stderr)
        return 1
    show(summary, repetitions)
    write_summary(args.out, facts | summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
