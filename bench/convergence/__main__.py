"""`make convergence`: train replicas under every synchronisation policy on the same text.

Exit codes: 0 done, 1 something went wrong, 2 bad arguments, 130 interrupted.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.convergence import report, summary
from bench.convergence.config import POLICIES, Run, StudyConfig, StudyError, check, runs
from bench.convergence.study import play_in_process
from bench.demo.config import ModelConfig
from bench.demo.corpus import load_corpus
from bench.demo.model import cached_model
from bench.machine import git_commit, machine, usable_cores
from bench.report.progress import Terminal
from bench.report.verdict import STYLES
from services.arguments import parser_class

#: Lengths of the steps on the progress bar, seconds.
_MODEL_S, _UPDATE_S = 45.0, 0.025
#: `--quick`: enough to see that everything works, too short for figures.
_QUICK = StudyConfig(
    updates=80, seeds=1, evaluate_every=40, model=ModelConfig(hidden=32, layers=1, pretrain_steps=5), held_out_windows=4
)


def build_parser() -> argparse.ArgumentParser:
    """Options of `make convergence CONVERGENCE_ARGS="..."`."""
    defaults = StudyConfig()
    parser = parser_class("convergence")(prog="python -m bench.convergence", description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, help=f"optimizer steps of a run, in all (default {defaults.updates})")
    parser.add_argument("--seeds", type=int, help=f"orders of the text (default {defaults.seeds})")
    parser.add_argument("--replicas", default="2,4", help="numbers of replicas (default 2,4)")
    parser.add_argument("--policies", default=",".join(defaults.policies), help=f"of {', '.join(POLICIES)}")
    parser.add_argument("--processes", type=int, default=0, help="runs at a time (default: one per core)")
    parser.add_argument("--out", type=Path, default=defaults.out, help="where results go (default out/convergence)")
    parser.add_argument("--quick", action="store_true", help="a tiny model for seconds: a check, no figures")
    return parser


def parse(arguments: Sequence[str]) -> StudyConfig:
    """The configuration. Raises StudyError naming what makes no sense."""
    options = build_parser().parse_args(arguments)
    base = _QUICK if options.quick else StudyConfig()
    try:
        replicas = tuple(int(value) for value in options.replicas.split(","))
    except ValueError as error:
        raise StudyError(f"--replicas must be numbers with commas between, got {options.replicas!r}") from error
    config = replace(
        base,
        updates=base.updates if options.updates is None else options.updates,
        seeds=base.seeds if options.seeds is None else options.seeds,
        replicas=replicas,
        policies=tuple(name.strip() for name in options.policies.split(",") if name.strip()),
        processes=options.processes,
        out=options.out,
    )
    check(config)
    return config


def run(config: StudyConfig, console: Console) -> dict[str, Any]:
    """Everything; writes the summary and the page and returns the former."""
    began_s, started_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    planned = runs(config)
    processes = config.processes or usable_cores()
    screen = Terminal(console, _MODEL_S + len(planned) * config.updates * _UPDATE_S)
    with screen.running():
        with screen.step("pre-training the model (once)", _MODEL_S):
            model, facts = cached_model(
                config.model,
                load_corpus(),
                max_context_tokens=config.model.pretrain_length,
                cache=config.cache,
                progress=lambda done, total: screen.advance(
                    _MODEL_S * done / total, f"pre-training the model: step {done}/{total}"
                ),
            )
        results = _play_all(planned, config, model, processes, screen)
    result = summary.build(
        config,
        results,
        {
            "started_at": started_at,
            "git_commit": git_commit(),
            "machine": machine(),
            "model": facts,
            "seconds_total": round(time.monotonic() - began_s, 1),
        },
        f"source code of Python's standard library, {config.updates * config.piece_tokens:,} tokens; "
        f"{config.held_out_windows * config.piece_tokens:,} held-out tokens of other files",
    )
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "summary.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (config.out / "report.html").write_text(report.render(result), encoding="utf-8")
    return result


def _play_all(
    planned: Sequence[Run], config: StudyConfig, model: Path, processes: int, screen: Terminal
) -> dict[Run, dict[str, Any]]:
    results: dict[Run, dict[str, Any]] = {}
    # Fresh processes: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        waiting = {pool.submit(play_in_process, item, config, model): item for item in planned}
        try:
            for future in as_completed(waiting):
                item = waiting[future]
                results[item] = future.result()
                with screen.step(f"{len(results)}/{len(planned)} runs; {item.label}", config.updates * _UPDATE_S):
                    pass
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.kill()  # a run lasts a minute, which nobody who interrupts wants to wait
            raise
    return results


def print_results(console: Console, result: Mapping[str, Any]) -> None:
    """The table and the claims."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("policy", no_wrap=True, vertical="bottom")
    for name in ("N", "held-out loss", "range", "over one trainer", "in equal time", "apart", "KL"):
        table.add_column(name, justify="right", vertical="bottom", min_width=6)
    for row in result["results"]:
        values, (low, high) = row["final"], row["spread"]["loss"]
        table.add_row(
            row["title"],
            str(row["replicas"]),
            f"{values['loss']:.3f}",
            f"{low:.2f}–{high:.2f}",
            f"{100 * (values['over_reference'] - 1):+.1f} %",
            f"{100 * (values['over_reference_in_time'] - 1):+.1f} %",
            f"{values['distance']:.4f}",
            f"{values['kl']:.4f}",
        )
    console.print(table)
    lines = Table.grid(padding=(0, 1, 0, 0))
    lines.add_column(justify="right", no_wrap=True, min_width=10)
    lines.add_column()
    for claim in result["claims"]:
        said = f"{claim['claim']}: {claim['median']:.4f} times"
        lines.add_row(Text(claim["verdict"], STYLES[claim["verdict"]]), Text(said))
    console.print(lines)


def main(arguments: Sequence[str]) -> int:
    """Run the study; returns the exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        config = parse(arguments)
    except StudyError as error:
        print(f"convergence: {error}", file=sys.stderr)
        return 2
    console = Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = run(config, console)
    except (ValueError, OSError, BrokenProcessPool) as error:
        print(f"convergence: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("convergence: interrupted", file=sys.stderr)
        return 130
    print_results(console, result)
    print(f"Took {result['seconds_total']:.0f} s. Open {config.out}/report.html; figures in {config.out}/summary.json")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
