"""`make colocation`: how much training fits into what serving leaves, and what it costs the requests.

Exit codes: 0 measured (whatever the claims), 1 a live cluster failed, or requests on it, 2 bad arguments,
130 interrupted.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.colocation import report
from bench.colocation.claims import claims
from bench.colocation.config import HALF, ColocationConfig, ColocationError, LiveConfig
from bench.colocation.live_study import live_study
from bench.colocation.pool import side_by_side
from bench.colocation.scenario import profile, promise, simulate
from bench.colocation.study import Study
from bench.live.errors import LiveError
from bench.live.interrupt import run_interruptible
from bench.report.summary import run_facts
from bench.report.verdict import STYLES
from deploy.local.cluster import ClusterError
from services.arguments import parser_class
from services.simulator.profile_file import ProfileError
from services.simulator.trace_file import TraceError, read_trace

#: `--quick`: enough to see that everything works, too few for figures.
_QUICK: Mapping[str, Any] = {"seeds": (0,), "seconds": 15.0, "shares": (0.5, 1.0), "tolerance": 0.3}
_QUICK_LIVE: Mapping[str, Any] = {"clock_real_seconds": 5.0, "real_seconds": 20.0, "large_real_seconds": 16.0}
_QUICK_HELP = "a check that everything works, without verdicts; about 5 minutes, live clusters included"
_MAX_PROBLEMS_SHOWN = 10
_FULL: Mapping[str, Any] = {
    "seeds": tuple(range(5)),
    "seconds": 400.0,
    "shares": (0.1, 0.25, HALF, 0.75, 1.0),
    "tolerance": 0.02,
}


def build_parser() -> argparse.ArgumentParser:
    """Options of `make colocation COLOCATION_ARGS="..."`."""
    defaults = ColocationConfig()
    parser = parser_class("colocation")(prog="python -m bench.colocation", description=__doc__.splitlines()[0])
    parser.add_argument("--policies", help=f"default {','.join(defaults.policies)}")
    parser.add_argument("--nodes", type=int, default=defaults.nodes, help=f"default {defaults.nodes}")
    parser.add_argument("--profile", type=Path, default=defaults.profile, help=f"of a node; default {defaults.profile}")
    parser.add_argument(
        "--fast-profile", type=Path, default=defaults.fast_profile, help="of the fast half of a cluster of two speeds"
    )
    parser.add_argument("--seconds", type=float, help="length of the traffic of a simulation")
    parser.add_argument("--seeds", type=int, help="how many seeds (default 3)")
    parser.add_argument("--time-scale", type=float, help="of live runs (default: the smallest that keeps time)")
    parser.add_argument("--no-live", action="store_true", help="the simulator alone")
    parser.add_argument("--trace", type=Path, help="CSV with arrival_s,prompt_tokens,output_tokens to follow")
    parser.add_argument("--full", action="store_true", help="more and longer simulations")
    parser.add_argument("--quick", action="store_true", help=_QUICK_HELP)
    parser.add_argument("--processes", type=int, default=0, help="simulations at a time (default: one per core)")
    parser.add_argument("--out", type=Path, default=defaults.out, help=f"where results go (default {defaults.out})")
    return parser


def parse(arguments: Sequence[str]) -> ColocationConfig:
    """The configuration. Raises ColocationError, ProfileError and TraceError, which name what makes no sense."""
    options = build_parser().parse_args(arguments)
    changes: dict[str, Any] = dict(_QUICK if options.quick else _FULL if options.full else {})
    if options.policies is not None:
        changes["policies"] = tuple(name.strip() for name in options.policies.split(",") if name.strip())
    if options.seconds is not None:
        changes["seconds"] = options.seconds
    if options.seeds is not None:
        changes["seeds"] = tuple(range(options.seeds))
    config = ColocationConfig(
        live=_live(options, changes.get("policies", ColocationConfig().policies)),
        is_quick=options.quick,
        nodes=options.nodes,
        profile=options.profile,
        fast_profile=options.fast_profile,
        trace=options.trace,
        processes=options.processes,
        out=options.out,
        **changes,
    )
    for path in (config.profile, config.fast_profile, config.live.large_profile):
        promise(path)
    _check_stages(config)
    if config.trace is not None:
        read_trace(config.trace)
    return config


def _check_stages(config: ColocationConfig) -> None:
    """Nodes of one cluster have equally many stages. Raises ColocationError."""
    slow, fast = (profile(path).latency.num_stages for path in (config.profile, config.fast_profile))
    if slow != fast:
        raise ColocationError(
            f"--profile {config.profile} has {slow} stage(s) but --fast-profile {config.fast_profile} has {fast}: "
            "the nodes of the cluster of two speeds need equally many"
        )


def _live(options: argparse.Namespace, policies: tuple[str, ...]) -> LiveConfig:
    """All policies with --full."""
    live = LiveConfig(time_scale=options.time_scale, **(_QUICK_LIVE if options.quick else {}))
    if options.no_live:
        return replace(live, policies=())
    return replace(live, policies=policies) if options.full else live


async def run(config: ColocationConfig, console: Console) -> dict[str, Any]:
    """Everything; writes the summary and the page and returns the former. Raises LiveError, ClusterError."""
    began_s, known = time.monotonic(), run_facts()

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    with side_by_side(simulate, config.num_processes) as simulate_all:
        # In a thread, so that an interrupt is heard meanwhile.
        found = await asyncio.to_thread(Study(config, simulate_all, say).run)
        live = None
        if config.live.policies:
            live = await live_study(config, found["capacity_rps"], simulate_all, say, lambda at_s: None)
    slo = promise(config.profile)
    summary = {
        **known,
        "config": config.to_json(),
        "slo": asdict(slo),
        "seconds_total": round(time.monotonic() - began_s, 1),
        **found,
        "time_scale": live and live["time_scale"],
        "clock_slip_p99_frac": live and live["clock_slip_p99_frac"],
        "live": live,
        "claims": claims({**found, "live": live}, is_quick=config.is_quick),
    }
    (config.out / "summary.json").write_text(json.dumps(summary, indent=1, default=str) + "\n", encoding="utf-8")
    (config.out / "report.html").write_text(report.render(summary), encoding="utf-8")
    return summary


def main(arguments: Sequence[str]) -> int:
    """Run everything; returns the exit code."""
    console = Console()
    # Every run needs an empty ledger, so each cluster starts a Redis of its own.
    os.environ.pop("LEMIX_REDIS_URL", None)
    try:
        config = parse(arguments)
        config.out.mkdir(parents=True, exist_ok=True)
    except (ColocationError, ProfileError, TraceError) as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"--out: {config.out}: {error.strerror}")
    try:
        summary = run_interruptible(run(config, console))
    except (LiveError, ClusterError) as error:
        print(f"colocation: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("colocation: interrupted; everything is stopped", file=sys.stderr)
        return 130
    for words in report.meanings(summary):
        console.print(words, highlight=False, markup=False, soft_wrap=True)
    for item in report.terminal_tables(summary):
        console.print(item)
    for verdict, words in report.claim_lines(summary):
        console.print(f"[{STYLES[verdict]}]{verdict:>10}[/{STYLES[verdict]}]  {words}", highlight=False, soft_wrap=True)
    print(f"Took {summary['seconds_total']:.0f} s. Open {config.out}/report.html; figures in {config.out}/summary.json")
    problems = summary["live"]["problems"] if summary["live"] else []
    for problem in problems[:_MAX_PROBLEMS_SHOWN]:
        print(f"  {problem}", file=sys.stderr)
    return 1 if problems else 0


def _fail(message: str) -> int:
    print(f"colocation: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
