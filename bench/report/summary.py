"""The file a benchmark leaves: what it ran on and with, then what it measured."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.machine import git_commit, machine


def run_facts() -> dict[str, Any]:
    """`git_commit`, `started_at` (UTC) and `machine`; asked for before anything is measured."""
    return {
        "git_commit": git_commit(),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }


def write_summary(path: Path, summary: Mapping[str, Any], page: str = "") -> None:
    """Write the summary as JSON and the page ("": none) beside it, and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    written = [path]
    if page:
        written.append(path.with_suffix(".html"))
        written[-1].write_text(page, encoding="utf-8")
    print(f"Wrote {' and '.join(map(str, written))}")
