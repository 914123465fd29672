"""`make simulate`: what a cluster would do, how many nodes it takes, how much training fits.

Exit codes: 0 done, 1 a search found nothing that is good enough, 2 bad input, 130 interrupted.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from services.simulator import terminal
from services.simulator.cautions import of_runs
from services.simulator.figures import Figures
from services.simulator.options import build_parser
from services.simulator.pool import simulations
from services.simulator.setting import Setting, build
from services.simulator.what_if import Outcome, fewest_nodes, most_training, nodes


def main(arguments: Sequence[str], console: Console | None = None) -> int:
    """Run a command; returns the exit code."""
    console = console or Console()
    try:
        options = build_parser().parse_args(arguments)
        setting = build(options)
        return (
            _simulate(console, options, setting) if options.command == "simulate" else _plan(console, options, setting)
        )
    except ValueError as error:
        sys.stderr.write(f"simulate: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("simulate: interrupted\n")
        return 130


def _simulate(console: Console, options: argparse.Namespace, setting: Setting) -> int:
    policies = [options.policy, *options.compare]
    runs: dict[str, list[Figures]] = {}
    with _progress(console) as progress, simulations(options.processes) as simulate:
        bar = progress.add_task("", total=len(policies) * len(setting.seeds))
        for name in policies:
            # Options are those of the first policy: another one knows none of them.
            own = setting.scenario.policy_options if name == options.policy else {}
            scenario = replace(setting.scenario, policy=name, policy_options=own)
            progress.update(bar, description=name)
            runs[name] = simulate(scenario, setting.seeds, lambda _: progress.advance(bar))
    terminal.print_figures(console, _title(setting, nodes(setting.scenario.num_nodes)), runs)
    for name, figures in runs.items():
        title = f"{name}, seed {setting.seeds[0]}: busy share of the stages' time"
        terminal.print_loads(console, title, figures[0].nodes)
    training_tokens_per_s = setting.scenario.training.tokens_per_s
    found = [line for name, several in runs.items() for line in of_runs(name, several, training_tokens_per_s)]
    warnings = [*setting.cautions, *found]
    _print_notes(console, setting, warnings)
    policies_json = {name: [figures.to_json() for figures in several] for name, several in runs.items()}
    described = {**setting.describe(), "warnings": warnings}
    _write(options.json, {**described, "nodes": options.nodes, "policies": policies_json})
    return 0


def _plan(console: Console, options: argparse.Namespace, setting: Setting) -> int:
    terminal.say(console, _title(setting, options.policy))
    with _progress(console) as progress, simulations(options.processes) as simulate:
        bar = progress.add_task("", total=None)
        ends_s = progress.get_time() + options.deadline_s

        def on_probe(label: str, flaw: str, figures: Sequence[Figures]) -> None:
            terminal.say(progress.console, terminal.probe_line(label, flaw, figures))

        def on_run(label: str, seed: int) -> None:
            progress.update(bar, description=f"{label}, seed {seed}")

        question = fewest_nodes if options.question == "fewest-nodes" else most_training
        outcome = question(options, setting, simulate, lambda: progress.get_time() >= ends_s, on_run, on_probe)
    for line in outcome.lines:
        terminal.say(console, line)
    _print_best(console, setting, outcome)
    warnings = [*setting.cautions, *of_runs(options.policy, outcome.shown, math.inf)]
    _print_notes(console, setting, warnings)
    asked = {"question": options.question, "policy": options.policy, "nodes": vars(options).get("nodes")}
    _write(options.json, {**setting.describe(), "warnings": warnings, **asked, **outcome.to_json()})
    return 0 if outcome.answer.value is not None else 1


def _print_best(console: Console, setting: Setting, outcome: Outcome) -> None:
    if outcome.shown:
        terminal.print_figures(console, outcome.shown_title, {setting.scenario.policy: outcome.shown})


def _title(setting: Setting, what: str) -> str:
    slo, sample = setting.scenario.slo, setting.sample
    parts = (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s))
    promised = " and ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in parts if seconds)
    return (
        f"{what}; profile {setting.profile.profile_id or 'unnamed'}; promise {promised}; {sample.source}: "
        f"{sample.num_requests} requests, {sample.rate:.2f}/s, "
        f"{sample.mean_prompt_tokens:.0f} prompt and {sample.mean_output_tokens:.0f} output tokens on average"
    )


def _print_notes(console: Console, setting: Setting, warnings: Sequence[str]) -> None:
    terminal.say(console, f"{terminal.demand_line(setting.demand)}; durations vary by {setting.noise:.1%}")
    if setting.sample.num_requests < 100:
        terminal.say(console, f"p99 of {setting.sample.num_requests} requests is the slowest of them: simulate more")
    for line in warnings:
        terminal.say(console, f"warning: {line}")


def _progress(console: Console) -> Progress:
    columns = (BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=console, transient=True, refresh_per_second=4, disable=not console.is_terminal)


def _write(path: Path | None, summary: dict[str, Any]) -> None:
    if path is not None:
        try:
            path.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--json {path}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
