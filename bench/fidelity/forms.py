"""Which latency form fits where: `python -m bench.fidelity.forms`.

Times small random-weight Llamas on one thread (eager and fused attention; float32, bfloat16 and weight-only int8; 4 to
1024 tokens), fits every form that the profiler knows and compares their held-out errors. Writes
`out/fidelity/forms/summary.json` and `.html`. Runs under two minutes.
"""

import argparse
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.fidelity.forms_page import HEAD, page, rows
from bench.fidelity.forms_study import FormsConfig, measure, study
from bench.report.summary import run_facts, write_summary


def forms_study(config: FormsConfig, console: Console) -> list[dict[str, Any]]:
    """Fits of every form to every model, operation and range of lengths."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("rounds", total=config.rounds + 1)
        timings = measure(config, lambda done, _: shown.update(task, completed=done))
    return study(timings)


def main() -> None:
    """Measure, print the table, write the summary."""
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity.forms", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/fidelity/forms"), help="directory of the results")
    parser.add_argument("--deadline-s", type=float, default=FormsConfig().deadline_s, help="begin no round after it")
    args = parser.parse_args()
    config = replace(FormsConfig(), deadline_s=args.deadline_s)
    about = run_facts()
    console = Console()
    entries = forms_study(config, console)
    result = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for title in HEAD:
        result.add_column(title, no_wrap=True, justify="left" if title == HEAD[0] else "right")
    for row in rows(entries):
        result.add_row(*row)
    console.print(result)
    #: Runnable processes of the machine over the last minute: above its cores, times are those of a busy one.
    summary = {**about, "config": {**asdict(config), "threads": 1, "load": os.getloadavg()[0]}, "forms": entries}
    write_summary(args.out / "summary.json", summary, page(summary))


if __name__ == "__main__":
    main()
