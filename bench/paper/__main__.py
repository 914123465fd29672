"""`make paper`: the paper's claims, on the production scheduler and node cores in simulated time.

Exit codes: 0 every simulation ended well (whatever the claims), 1 some did not, 2 bad arguments, 130 interrupted.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.machine import git_commit, machine
from bench.paper import report, terminal
from bench.paper.config import ALL_POLICIES, DEFAULT_POLICIES, FULL_SEEDS, PaperConfig, PaperError
from bench.paper.families import FAMILIES
from bench.paper.pool import rows
from bench.paper.scenario import Run
from bench.report.progress import Terminal

#: `--quick`: enough to see that everything works, too few for figures.
_QUICK: Mapping[str, Any] = {
    "seeds": (0,),
    "rates": (8.0, 24.0),
    "training_shares": (0.3, 0.7),
    "mean_forwards_s": (0.06,),
    "num_tasks": 150,
}


def build_parser() -> argparse.ArgumentParser:
    """Options of `make paper PAPER_ARGS="..."`."""
    parser = argparse.ArgumentParser(prog="python -m bench.paper", description=__doc__.splitlines()[0])
    parser.add_argument("--policies", help=f"of {', '.join(ALL_POLICIES)}; default {','.join(DEFAULT_POLICIES)}")
    parser.add_argument("--seeds", help="seeds of the traffic (default 0,1,2; 100-102 are for tuning)")
    parser.add_argument("--full", action="store_true", help=f"every policy, {len(FULL_SEEDS)} seeds")
    parser.add_argument("--quick", action="store_true", help="a few short points: a check, no figures")
    parser.add_argument("--processes", type=int, default=0, help="simulations at a time (default: one per core)")
    parser.add_argument("--out", type=Path, default=PaperConfig().out, help="where results go (default out/paper)")
    return parser


def parse(arguments: Sequence[str]) -> PaperConfig:
    """The configuration. Raises PaperError naming what makes no sense."""
    options = build_parser().parse_args(arguments)
    changes: dict[str, Any] = dict(_QUICK) if options.quick else {}
    if options.full:
        changes |= {"seeds": FULL_SEEDS, "policies": ALL_POLICIES}
    if options.seeds is not None:
        changes["seeds"] = _seeds(options.seeds)
    if options.policies is not None:
        changes["policies"] = tuple(name.strip() for name in options.policies.split(",") if name.strip())
    return PaperConfig(processes=options.processes, out=options.out, **changes)


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise PaperError(f"--seeds must be whole numbers separated by commas, got {text!r}") from None


def run(config: PaperConfig, console: Console) -> dict[str, Any]:
    """Everything; writes the summary and the page and returns the former."""
    began_s, started_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    # Before the runs: what is edited meanwhile is not what ran.
    commit = git_commit()
    measured = _simulate(config, console)
    results: dict[str, Any] = {"claims": [], "problems": []}
    for family in FAMILIES:
        found = family.summarise(measured[family.name])
        results["claims"] += found.pop("claims", [])
        results["problems"] += found.pop("problems", [])
        results |= found
    summary = {
        "started_at": started_at,
        "git_commit": commit,
        "machine": machine(),
        "seeds": list(config.seeds),
        "config": config.to_json(),
        "seconds_total": round(time.monotonic() - began_s, 1),
        **results,
    }
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (config.out / "report.html").write_text(report.render(config, summary), encoding="utf-8")
    return summary


def _simulate(config: PaperConfig, console: Console) -> dict[str, list[dict[str, Any]]]:
    """Rows of every family, all through one pool."""
    families = {family.name: family.runs(config) for family in FAMILIES}
    everything = [run for runs in families.values() for run in runs]
    screen = Terminal(console, len(everything))

    def on_done(num_done: int, last: Run) -> None:
        screen.advance(num_done, f"{num_done} of {len(everything)} simulations, {last.policy}")

    label = f"{len(everything)} simulations on {config.num_processes} cores"
    with screen.running(), screen.step(label, len(everything)):
        results = iter(rows(everything, config.num_processes, on_done))
        return {name: [next(results) for _ in runs] for name, runs in families.items()}


def main(arguments: Sequence[str]) -> int:
    """Run everything; returns the exit code."""
    console = Console()
    try:
        config = parse(arguments)
    except PaperError as error:
        print(f"paper: {error}", file=sys.stderr)
        return 2
    try:
        summary = run(config, console)
    except KeyboardInterrupt:
        print("paper: interrupted", file=sys.stderr)
        return 130
    terminal.print_results(console, summary)
    print(f"Took {summary['seconds_total']:.0f} s. Open {config.out}/report.html; figures in {config.out}/summary.json")
    return 1 if summary["problems"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
