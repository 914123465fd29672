"""`make fidelity`: predictions against a real engine, the simulator against live clusters.

Exit codes: 0 measured (whatever the verdicts), 1 something went wrong (it is listed), 2 bad arguments, 130 interrupted.
"""

import argparse
import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.fidelity import report, summary, terminal
from bench.fidelity.calibration import calibration_study
from bench.fidelity.config import FidelityConfig
from bench.fidelity.emulated import EmulatedCluster
from bench.fidelity.real import SERVING, TRAINING, RealCluster, cached_model
from bench.fidelity.workloads import EMULATED
from bench.live.errors import LiveError
from bench.live.interrupt import run_interruptible
from bench.report.progress import Terminal
from bench.report.summary import run_facts
from deploy.local.cluster import ClusterError
from services.arguments import parser_class

#: Lengths of the steps on the progress bar, seconds.
_MODEL_S, _PROFILE_S, _START_S = 10.0, 40.0, 12.0
_CALIBRATION_S = 20.0
_CALIBRATION_SEEDS = 20
_QUICK_S = 8.0
_MAX_PROBLEMS_SHOWN = 10
#: Tokens of an emulated request's prompt and output at most; layers of Llama-2-7B.
_EMULATED_CONTEXT, _EMULATED_LAYERS = 4096, 32


def build_parser() -> argparse.ArgumentParser:
    """Options of `make fidelity FIDELITY_ARGS="..."`."""
    names = ", ".join(workload.name for workload in EMULATED)
    parser = parser_class("fidelity")(prog="python -m bench.fidelity", description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=1, help="repetitions of everything (default 1)")
    parser.add_argument("--workloads", help=f"on the emulated cluster, of {names} (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the traffic (default 0)")
    parser.add_argument(
        "--out", type=Path, default=FidelityConfig().out, help="where results go (default out/fidelity)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="8 s of traffic each, a check that everything works, without verdicts: about 5 minutes with all workloads",
    )
    return parser


def parse(arguments: Sequence[str]) -> tuple[FidelityConfig, int]:
    """The configuration and how often it runs. Raises LiveError naming what makes no sense."""
    options = build_parser().parse_args(arguments)
    if options.repeat < 1:
        raise LiveError(f"--repeat must be at least 1, got {options.repeat}")
    known = {workload.name: workload for workload in EMULATED}
    names = list(known) if options.workloads is None else [name.strip() for name in options.workloads.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise LiveError(f"--workloads: unknown workload {unknown[0]!r}; known: {', '.join(known)}")
    config = FidelityConfig(seed=options.seed, out=options.out, workloads=tuple(known[name] for name in names))
    if options.quick:
        config = replace(
            config,
            quick=True,
            real=replace(config.real, seconds=_QUICK_S, hidden=256, layers=4),
            emulated=replace(config.emulated, seconds=_QUICK_S),
        )
    return config, options.repeat


async def run(config: FidelityConfig, repeat: int, console: Console) -> dict[str, Any]:
    """Everything; writes the summary and the report and returns the former. Raises LiveError, ClusterError."""
    facts, began_s = run_facts(), time.monotonic()
    per_repetition = (
        _PROFILE_S + 2 * (_START_S + config.real.seconds) + len(config.workloads) * (_START_S + config.emulated.seconds)
    )
    screen = Terminal(console, _MODEL_S + repeat * per_repetition + _CALIBRATION_S)
    config.out.mkdir(parents=True, exist_ok=True)
    repetitions: list[dict[str, Any]] = []
    problems: list[str] = []
    with screen.running():
        with screen.step("making the models", _MODEL_S):
            real = config.real
            model = cached_model(
                config.cache, hidden=real.hidden, layers=real.layers, max_context_tokens=real.max_context_tokens
            )
            # Of an emulated model only the number of layers matters, by which micro-batches are cut.
            empty = cached_model(config.cache, hidden=32, layers=_EMULATED_LAYERS, max_context_tokens=_EMULATED_CONTEXT)
        for index in range(repeat):
            seeded = replace(config, seed=config.seed + index)
            found, wrong = await _repetition(seeded, model, empty, screen)
            repetitions.append(found)
            problems += wrong
        with screen.step("drawing devices that calibration learns", _CALIBRATION_S):
            calibration = await study_calibration()
    result = summary.build(config, facts, repetitions, calibration, problems, time.monotonic() - began_s)
    (config.out / "summary.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (config.out / "report.html").write_text(report.render(result, repetitions[0]["points"]), encoding="utf-8")
    return result


async def study_calibration() -> dict[str, Any]:
    """The study, in a thread that soon ends when the task is cancelled: the interpreter waits for it at the exit."""
    stop = threading.Event()
    try:
        return await asyncio.to_thread(calibration_study, _CALIBRATION_SEEDS, stop)
    finally:
        stop.set()


async def _repetition(
    config: FidelityConfig, model: Path, empty: Path, screen: Terminal
) -> tuple[dict[str, Any], list[str]]:
    real = RealCluster(config, model)
    problems: list[str] = []
    with screen.step("real engine: profiling", _PROFILE_S):
        profile = await real.profile()
    found: dict[str, Any] = {"real": {}, "simulator_vs_cpu": {}, "simulator_vs_live": [], "points": {}}
    for name in (SERVING, TRAINING):
        label = f"real engine: {name}"
        with screen.step(label, _START_S + config.real.seconds):
            measured = await real.run(name, profile, _on_progress(screen, label))
        found["real"][name] = measured.predictions
        found["simulator_vs_cpu"][name] = measured.simulator
        found["points"][name] = measured.points
        problems += measured.problems
    emulated = EmulatedCluster(config, empty)
    for workload in config.workloads:
        label = f"emulated cluster: {workload.name}"
        with screen.step(label, _START_S + config.emulated.seconds):
            outcome = await emulated.run(workload, _on_progress(screen, label))
        found["simulator_vs_live"].append(outcome.entry)
        problems += outcome.problems
    return {"prediction": summary.prediction(found["real"]), "models": summary.models(profile), **found}, problems


def _on_progress(screen: Terminal, label: str) -> Callable[[float], None]:
    return lambda at_s: screen.advance(_START_S + at_s, label)


def main(arguments: Sequence[str]) -> int:
    """Measure; returns the exit code."""
    console = Console()
    # Every run needs an empty ledger, so each cluster starts a Redis of its own.
    os.environ.pop("LEMIX_REDIS_URL", None)
    try:
        config, repeat = parse(arguments)
    except LiveError as error:
        print(f"fidelity: {error}", file=sys.stderr)
        return 2
    try:
        result = run_interruptible(run(config, repeat, console))
    except (LiveError, ClusterError) as error:
        print(f"fidelity: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("fidelity: interrupted; everything is stopped", file=sys.stderr)
        return 130
    terminal.print_results(console, result)
    print(f"Took {result['seconds_total']:.0f} s. Open {config.out}/report.html; figures in {config.out}/summary.json")
    for problem in result["problems"][:_MAX_PROBLEMS_SHOWN]:
        print(f"  {problem}", file=sys.stderr)
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
