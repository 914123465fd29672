"""How much longer emulated operations must take so that a cluster on this machine keeps their time.

`python -m bench.fidelity.clock`: starts an emulated cluster with all its services under a load, with training beside,
and finds the smallest time scale whose p99 clock slip is under 2 % of the scaled operation's time.
"""

import argparse
import asyncio
import math
import random
import string
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bench.live.emulated import PROFILES, ClockSlip, clock_slip, emulated_cluster
from bench.live.errors import LiveError
from bench.live.requests import PlannedRequest, RequestRecord, Status
from bench.live.run import Backlog, send
from bench.machine import usable_cores
from deploy.local.cluster import ClusterError, LocalCluster
from services.arguments import parser_class
from services.simulator.traffic import WORKLOADS, DrawnTraffic

#: p99 of the clock slip must stay under this share of an operation's scaled time.
LIMIT = 0.02
SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
#: Prompts and outputs of the load are cut here, tokens.
_LONGEST_PROMPT, _LONGEST_OUTPUT = 3000, 200
_TRAINING_TOKENS, _TRAINING_TEXTS = 512, 32
#: Promises in emulated time, seconds.
_TTFT_S, _TPOT_S = 1.0, 0.1
_PROFILE = PROFILES / "a100-llama-2-7b.json"


class Overloaded(LiveError):
    """Part of the load did not run: the clock slip of the rest says nothing."""


class Choice(NamedTuple):
    """The smallest scale that keeps time, and what was measured at every scale tried. None: none of them does."""

    time_scale: float | None
    tried: dict[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Azure's conversations at `rate` requests per second of emulated time, for `seconds` of real time."""

    nodes: int = 4
    profile: Path = _PROFILE
    rate: float = 8.0
    seconds: float = 20.0
    trains: bool = True
    max_batch: int = 64
    seed: int = 0


async def smallest_time_scale(
    p99_slip: Callable[[float], Awaitable[float]], scales: Sequence[float] = SCALES, limit: float = LIMIT
) -> Choice:
    """The smallest of the rising `scales` whose p99 clock slip is under the limit, by halving what is left.

    p99_slip: measures it at a scale, as a share of the scaled operation's time. The slip falls with the scale.
    """
    tried: dict[float, float] = {}
    low, high = 0, len(scales)
    while low < high:
        # The first guess is early: large scales take long.
        middle = (low + high) // 2 if tried else (low + high) // 3
        scale = scales[middle]
        tried[scale] = await p99_slip(scale)
        if tried[scale] < limit:
            high = middle
        else:
            low = middle + 1
    return Choice(scales[low] if low < len(scales) else None, dict(sorted(tried.items())))


async def measure(load: Load, time_scale: float, directory: Path) -> tuple[ClockSlip, dict[str, float]]:
    """Clock slip of a run, and the CPU cores that every role used. Raises LiveError, ClusterError, Overloaded."""
    slo = {"ttft_s": _TTFT_S * time_scale, "tpot_s": _TPOT_S * time_scale}
    config = emulated_cluster(
        directory,
        profiles=(load.profile,) * load.nodes,
        time_scale=time_scale,
        core={"default_slo": slo, "sync": "none"},
        node={"max_batch": load.max_batch},
    )
    requests, backlog = traffic(load, time_scale)
    async with AsyncExitStack() as stack:
        cluster = LocalCluster(config)
        stack.push_async_callback(cluster.stop)
        await cluster.start()
        drain_s = load.seconds + 10.0 * time_scale
        plan = directory / "plan.jsonl"
        sent = await send(cluster, requests, seconds=load.seconds, drain_s=drain_s, plan=plan, backlog=backlog)
    check_load(sent.records)
    slip = clock_slip(directory)
    if not slip.ops:
        raise LiveError("no operation ran: there is no clock slip to judge by")
    return slip, {role: used_s / sent.wall_s for role, used_s in sent.cpu_s.items()}


def check_load(records: Sequence[RequestRecord]) -> None:
    """Raise LiveError for a request that failed, Overloaded for one that was refused or did not end in time."""
    bad = [record for record in records if record.status is not Status.OK]
    failed = [record for record in bad if record.status is Status.FAILED]
    if failed:
        raise LiveError(f"{len(failed)} of {len(records)} requests failed: {failed[0].error}")
    if bad:
        raise Overloaded(f"{len(bad)} of {len(records)} requests {bad[0].status.value}: {bad[0].error}")


def traffic(load: Load, time_scale: float) -> tuple[list[PlannedRequest], Backlog | None]:
    """Requests of a run, at times of real seconds, and what is trained meanwhile."""
    workload = WORKLOADS["azure-conv"]
    drawn = DrawnTraffic(workload.shape, load.rate, load.seconds / time_scale, workload.cv).draw(load.seed)
    rng = random.Random(load.seed)

    def text(tokens: int) -> str:
        return "".join(rng.choices(string.ascii_lowercase, k=tokens))

    requests = [
        PlannedRequest(
            f"request-{index}",
            row.arrival_s * time_scale,
            text(min(row.prompt_tokens, _LONGEST_PROMPT)),
            "",
            min(row.output_tokens, _LONGEST_OUTPUT),
            "",
        )
        for index, row in enumerate(drawn)
    ]
    backlog = Backlog(texts=[text(_TRAINING_TOKENS) for _ in range(_TRAINING_TEXTS)]) if load.trains else None
    return requests, backlog


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = parser_class("clock")(prog="python -m bench.fidelity.clock", description=__doc__)
    parser.add_argument("--nodes", type=int, default=4, help="emulated nodes (default 4)")
    parser.add_argument("--profile", type=Path, default=_PROFILE, help="profile of the nodes (default: A100, 2 stages)")
    parser.add_argument("--rate", type=float, default=8.0, help="requests per emulated second (default 8)")
    parser.add_argument("--seconds", type=float, default=20.0, help="real seconds of every run (default 20)")
    parser.add_argument("--no-training", action="store_true", help="serve alone")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="rising time scales to choose from")
    parser.add_argument("--out", type=Path, default=Path("out/clock"), help="directory of the runs (default out/clock)")
    return parser


async def _choose(options: argparse.Namespace) -> Choice:
    load = Load(
        nodes=options.nodes,
        profile=options.profile,
        rate=options.rate,
        seconds=options.seconds,
        trains=not options.no_training,
    )

    async def p99_slip(time_scale: float) -> float:
        try:
            slip, cores = await measure(load, time_scale, options.out / f"scale-{time_scale:g}")
        except Overloaded as error:
            print(f"time_scale {time_scale:g}: does not keep time: {error}", flush=True)
            return math.inf
        print(_line(time_scale, slip, cores), flush=True)
        return slip.p99

    return await smallest_time_scale(p99_slip, sorted(options.scales))


def _line(time_scale: float, slip: ClockSlip, cores: dict[str, float]) -> str:
    used, others = sum(cores.values()), cores.get("other_programs", 0.0)
    shares = f"p50 {slip.p50:.2%}, p99 {slip.p99:.2%}, {slip.total:.2%} of all time, worst {1e3 * slip.worst_s:.1f} ms"
    of_machine = f"{used:.2f} of {usable_cores()} cores in use, {others:.2f} by other programs"
    ops = f"{slip.ops} ops, wake priority {slip.wake_priority}"
    return f"time_scale {time_scale:g}: clock slip {shares}, {ops}; {of_machine}"


def main(arguments: Sequence[str]) -> int:
    """Exit code 0: found; 1: no scale keeps time, or the cluster failed."""
    options = build_parser().parse_args(arguments)
    try:
        choice = asyncio.run(_choose(options))
    except (LiveError, ClusterError) as error:
        print(f"clock: {error}", file=sys.stderr)
        return 1
    if choice.time_scale is None:
        print(f"no time scale up to {max(options.scales):g} keeps the p99 clock slip under {LIMIT:.0%}")
        return 1
    print(f"smallest time_scale with a p99 clock slip under {LIMIT:.0%}: {choice.time_scale:g}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
