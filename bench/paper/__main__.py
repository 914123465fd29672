"""`make paper`: the paper's claims, on the production scheduler and node cores in simulated time.

Exit codes: 0 every simulation ended well (whatever the claims), 1 some did not, 2 bad arguments, 130 interrupted.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.machine import git_commit, machine
from bench.paper import report, terminal
from bench.paper.config import ALL_POLICIES, DEFAULT_POLICIES, FULL_SEEDS, PaperConfig, PaperError
from bench.paper.families import FAMILIES
from bench.paper.family import Family, Labelled, Row
from bench.paper.limits import Job, Limit
from bench.paper.pool import rows
from bench.report.progress import Terminal
from services.arguments import parser_class

#: `--quick`: enough to see that everything works, too few for figures.
_QUICK: Mapping[str, Any] = {
    "seeds": (0,),
    "rates": (8.0, 24.0),
    "training_shares": (0.3, 0.7),
    "mean_forwards_s": (0.06,),
    "axis_rates": (8.0,),
    "axis_shares": (0.5,),
    "stress_rates": (50.0, 150.0),
    "num_tasks": 150,
    "days": 0.2,
}


def build_parser() -> argparse.ArgumentParser:
    """Options of `make paper PAPER_ARGS="..."`."""
    parser = parser_class("paper")(prog="python -m bench.paper", description=__doc__.splitlines()[0])
    parser.add_argument("--policies", help=f"of {', '.join(ALL_POLICIES)}; default {','.join(DEFAULT_POLICIES)}")
    parser.add_argument("--seeds", help="seeds of the traffic (default 0,1,2; 100-102 are for tuning)")
    parser.add_argument("--only", help=f"families to run, of {', '.join(family.name for family in FAMILIES)}")
    parser.add_argument("--full", action="store_true", help=f"every policy, {len(FULL_SEEDS)} seeds, nothing cut short")
    parser.add_argument("--quick", action="store_true", help="a few short points: a check, no figures")
    parser.add_argument("--processes", type=int, default=0, help="simulations at a time (default: one per core)")
    parser.add_argument("--out", type=Path, default=PaperConfig().out, help="where results go (default out/paper)")
    return parser


def parse(arguments: Sequence[str]) -> PaperConfig:
    """The configuration. Raises PaperError naming what makes no sense."""
    options = build_parser().parse_args(arguments)
    changes: dict[str, Any] = dict(_QUICK) if options.quick else {}
    if options.full:
        changes |= {"seeds": FULL_SEEDS, "policies": ALL_POLICIES, "full": True}
    if options.seeds is not None:
        changes["seeds"] = _seeds(options.seeds)
    if options.policies is not None:
        changes["policies"] = _names(options.policies)
    if options.only is not None:
        changes["only"] = _families(options.only)
    return PaperConfig(processes=options.processes, out=options.out, **changes)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _families(text: str) -> tuple[str, ...]:
    known, names = [family.name for family in FAMILIES], _names(text)
    for name in names:
        if name not in known:
            raise PaperError(f"--only: unknown family {name!r}; known: {', '.join(known)}")
    if not names:
        raise PaperError("--only names no family")
    return names


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise PaperError(f"--seeds must be whole numbers separated by commas, got {text!r}") from None


def chosen(config: PaperConfig) -> list[Family]:
    """The families to run, in the order of the page."""
    return [family for family in FAMILIES if not config.only or family.name in config.only]


def run(config: PaperConfig, console: Console) -> dict[str, Any]:
    """Everything; writes the summary and the page and returns the former."""
    began_s, started_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    # Before the runs: what is edited meanwhile is not what ran.
    commit = git_commit()
    measured = _simulate(config, console)
    results: dict[str, Any] = {"claims": [], "problems": _problems(measured.values())}
    for family in chosen(config):
        found = family.summarise(measured[family.name])
        results["claims"] += found.pop("claims", [])
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
    (config.out / "report.html").write_text(report.render(config, chosen(config), summary), encoding="utf-8")
    return summary


def _problems(measured: Iterable[Sequence[Row]]) -> list[str]:
    """Runs in which not every task ended well, although they were to: their figures mislead."""
    unfinished = {
        row["label"]: sum(other["label"] == row["label"] and other["n_ok"] < other["n_tasks"] for other in several)
        for several in measured
        for row in several
        if "n_ok" in row and row["n_ok"] < row["n_tasks"] and not row.get("may_fail")
    }
    return [f"{label}: {count} runs in which not every task ended well" for label, count in unfinished.items()]


def _simulate(config: PaperConfig, console: Console) -> dict[str, list[Row]]:
    """Rows of every family: a run that several of them name is simulated once."""
    families = chosen(config)
    known: dict[Job, dict[str, Any]] = {}
    planned = {family.name: family.runs(config) for family in families}
    _run_new(known, planned.values(), config, console)
    found = {name: _labelled(runs, known) for name, runs in planned.items()}
    more = {family.name: family.then(config, found[family.name]) for family in families}
    _run_new(known, more.values(), config, console)
    return {name: rows + _labelled(more[name], known) for name, rows in found.items()}


def _labelled(runs: Iterable[Labelled], known: Mapping[Job, dict[str, Any]]) -> list[Row]:
    return [{**known[run], "label": label} for label, run in runs]


def _run_new(
    known: dict[Job, dict[str, Any]],
    planned: Iterable[Sequence[Labelled]],
    config: PaperConfig,
    console: Console,
) -> None:
    """Simulate, or work out, what is not known yet."""
    new = [run for run in dict.fromkeys(run for runs in planned for _, run in runs) if run not in known]
    if not new:
        return
    screen = Terminal(console, len(new))

    def on_done(num_done: int, last: Job) -> None:
        screen.advance(num_done, f"{num_done} of {len(new)}, {last.policy}")

    num_limits = sum(isinstance(job, Limit) for job in new)
    words = [
        f"{count} {noun}" for count, noun in ((len(new) - num_limits, "simulations"), (num_limits, "bounds")) if count
    ]
    with screen.running(), screen.step(f"{' and '.join(words)} on {config.num_processes} cores", len(new)):
        known |= zip(new, rows(new, config.num_processes, on_done), strict=True)


def main(arguments: Sequence[str]) -> int:
    """Run everything; returns the exit code."""
    console = Console()
    try:
        config = parse(arguments)
        config.out.mkdir(parents=True, exist_ok=True)
    except PaperError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"--out: {config.out}: {error.strerror}")
    try:
        summary = run(config, console)
    except KeyboardInterrupt:
        print("paper: interrupted", file=sys.stderr)
        return 130
    terminal.print_results(console, chosen(config), summary)
    print(f"Took {summary['seconds_total']:.0f} s. Open {config.out}/report.html; figures in {config.out}/summary.json")
    return 1 if summary["problems"] else 0


def _fail(message: str) -> int:
    print(f"paper: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
