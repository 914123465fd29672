"""`make demo`: serve and train one model at once under several policies on the same traffic.

Exit codes: 0 every request ended well, 1 something went wrong (it is listed), 2 bad arguments, 130 interrupted.
"""

import argparse
import asyncio
import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.demo import metrics, report, summary, terminal
from bench.demo.config import POLICIES, ClusterConfig, DemoConfig, DemoError, ModelConfig, TrafficConfig, check
from bench.demo.corpus import Corpus, load_corpus
from bench.demo.model import cached_model
from bench.demo.profile import Promise
from bench.demo.records import RunRecord
from bench.demo.runner import OnProgress, Runner
from bench.demo.workload import describe, plan, read_trace
from bench.live.client_process import Counts
from bench.live.errors import LiveError
from bench.live.interrupt import run_interruptible
from bench.machine import git_commit, machine, usable_cores
from bench.report.progress import Terminal
from deploy.local.cluster import ClusterError
from services.arguments import parser_class

#: Lengths of the steps on the progress bar, seconds.
_MODEL_S, _PROFILE_S, _START_S = 50.0, 17.0, 12.0
#: `--quick`: enough to see that everything works, too short for figures.
_QUICK_MODEL = ModelConfig(hidden=64, layers=2, pretrain_steps=20)
_QUICK_SECONDS = 8.0
#: So small a model answers faster than the control plane on the same cores can ask.
_QUICK_LOAD = 0.04
_CONTEXT_TOKENS = 512
_MAX_PROBLEMS_SHOWN = 10


def build_parser() -> argparse.ArgumentParser:
    """Options of `make demo DEMO_ARGS="..."`."""
    defaults = DemoConfig()
    parser = parser_class("demo")(prog="python -m bench.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=defaults.repeat, help="runs per policy (default 1)")
    parser.add_argument("--policies", default=",".join(defaults.policies), help=f"of {', '.join(POLICIES)}")
    parser.add_argument("--nodes", type=int, default=defaults.cluster.nodes, help="node agents (default 2)")
    parser.add_argument("--stages", type=int, default=defaults.cluster.stages, help="stages per node (default 1)")
    parser.add_argument("--seconds", type=float, help="length of the traffic (default 40)")
    parser.add_argument("--load", type=float, help="mean request rate / one node's capacity (default 0.3)")
    parser.add_argument(
        "--training-share", type=float, help="share of tasks that is training, as feedback (default: endless backlog)"
    )
    parser.add_argument("--trace", type=Path, help="CSV with arrival_s,prompt_tokens,output_tokens to follow")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the traffic (default 0)")
    parser.add_argument("--out", type=Path, default=defaults.out, help="where results go (default out/demo)")
    parser.add_argument("--quick", action="store_true", help="a smaller model for a few seconds: a check, no figures")
    return parser


def parse(arguments: Sequence[str]) -> DemoConfig:
    """The configuration. Raises DemoError naming what makes no sense."""
    options = build_parser().parse_args(arguments)
    defaults = DemoConfig()
    seconds, load = defaults.traffic.seconds, defaults.traffic.load
    if options.quick:
        seconds, load = _QUICK_SECONDS, _QUICK_LOAD
    config = DemoConfig(
        policies=tuple(name.strip() for name in options.policies.split(",") if name.strip()),
        repeat=options.repeat,
        seed=options.seed,
        out=options.out,
        model=_QUICK_MODEL if options.quick else defaults.model,
        traffic=TrafficConfig(
            seconds=seconds if options.seconds is None else options.seconds,
            load=load if options.load is None else options.load,
            trace=None if options.trace is None else str(options.trace),
        ),
        training=replace(defaults.training, share=options.training_share),
        cluster=ClusterConfig(nodes=options.nodes, stages=options.stages),
    )
    check(config)
    if options.trace is not None:
        read_trace(options.trace)
    return config


async def run(config: DemoConfig, console: Console) -> dict[str, Any]:
    """Everything; writes the summary and the report and returns the former. Raises LiveError, ClusterError."""
    began_s, started_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    runs = len(config.policies) * config.repeat
    screen = Terminal(console, _MODEL_S + _PROFILE_S + runs * (_START_S + config.traffic.seconds))
    corpus = load_corpus()
    config.out.mkdir(parents=True, exist_ok=True)
    for line in summary.sharing_warnings(config, usable_cores()):
        screen.warn(line)
    with screen.running():
        model, facts = await _prepare_model(config, corpus, screen)
        runner = Runner(config, corpus, model)
        with screen.step("measuring one node (capacity, SLO)", _PROFILE_S):
            promised = await runner.profile()
        measured, first, problems, workload = await _run_policies(config, corpus, runner, promised, screen)
    result = summary.build(
        config,
        summary.RunFacts(
            started_at, machine(), git_commit(), promised, workload, facts, round(time.monotonic() - began_s, 1)
        ),
        measured,
        problems,
    )
    (config.out / "summary.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (config.out / "report.html").write_text(report.render(result, first), encoding="utf-8")
    return result


async def _prepare_model(config: DemoConfig, corpus: Corpus, screen: Terminal) -> tuple[Path, dict[str, Any]]:
    stopped = threading.Event()

    def progress(done: int, total: int) -> None:
        if stopped.is_set():
            raise DemoError("interrupted")  # ends the thread, which nothing else can
        screen.advance(_MODEL_S * done / total, f"pre-training the model: step {done}/{total}")

    with screen.step("pre-training the model (once)", _MODEL_S):
        try:
            return await asyncio.to_thread(
                cached_model,
                config.model,
                corpus,
                max_context_tokens=_CONTEXT_TOKENS,
                cache=config.cache,
                progress=progress,
            )
        finally:
            stopped.set()


async def _run_policies(
    config: DemoConfig, corpus: Corpus, runner: Runner, promised: Promise, screen: Terminal
) -> tuple[dict[str, list[dict[str, Any]]], list[RunRecord], list[str], dict[str, Any]]:
    """Metrics by policy and repetition, records of the first repetition, problems, and its workload in numbers."""
    measured: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    first: list[RunRecord] = []
    problems: list[str] = []
    workload: dict[str, Any] = {}
    rate = config.traffic.load * promised.capacity_rps
    for repetition in range(config.repeat):
        requests = plan(config.traffic, corpus, rate, config.seed + repetition)
        if not workload:
            workload = describe(requests, config.traffic)
            _say_promise(screen, config, promised, workload)
        for name in config.policies:
            label = f"{name} {repetition + 1}/{config.repeat}" if config.repeat > 1 else name
            with screen.step(f"{label}: starting a cluster", _START_S + config.traffic.seconds):
                outcome = await runner.run(
                    POLICIES[name], repetition, requests, promised, _on_progress(screen, label, len(requests))
                )
            measured[name].append(metrics.policy_metrics(outcome.record, promised.slo, config.hold_s))
            problems += outcome.problems
            if repetition == 0:
                first.append(outcome.record)
    return dict(measured), first, problems, workload


def _on_progress(screen: Terminal, label: str, total: int) -> OnProgress:
    def show(at_s: float, counts: Counts) -> None:
        answered, failed = counts.get("ok", 0), counts.get("bad", 0)
        failures = f", {failed} failed" if failed else ""
        screen.advance(_START_S + at_s, f"{label}: {answered}/{total} answered{failures}")

    return show


def _say_promise(screen: Terminal, config: DemoConfig, promised: Promise, workload: Mapping[str, Any]) -> None:
    screen.say(
        f"One node can serve {promised.capacity_rps:.1f} requests/s; each policy gets {workload['requests']} in "
        f"{workload['seconds']:g} s ({workload['mean_rate_rps']:.2f}/s)."
    )
    screen.say(
        f"SLO, fixed now: TTFT {1000 * promised.slo.ttft_s:.0f} ms, TPOT {1000 * promised.slo.tpot_s:.1f} ms "
        f"({config.slo_units:g} times the mean request alone)."
    )


def main(arguments: Sequence[str]) -> int:
    """Run the demo; returns the exit code."""
    console = Console()
    # Every policy needs an empty ledger, so each cluster starts a Redis of its own.
    os.environ.pop("LEMIX_REDIS_URL", None)
    try:
        config = parse(arguments)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    try:
        result = run_interruptible(run(config, console))
    except (LiveError, ClusterError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("demo: interrupted; everything is stopped", file=sys.stderr)
        return 130
    terminal.print_results(console, result)
    print(f"Took {result['seconds_total']:.0f} s. Open {config.out}/report.html; figures in {config.out}/summary.json")
    if result["problems"]:
        print(f"demo: {len(result['problems'])} things went wrong:", file=sys.stderr)
        for problem in result["problems"][:_MAX_PROBLEMS_SHOWN]:
            print(f"  {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
