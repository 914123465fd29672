"""What a person sees: tables of figures, probes as they come, the answer."""

import math
from collections.abc import Callable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from services.simulator.figures import Figures, NodeLoad, Spread, spread
from services.simulator.scenario import Demand

#: Seconds, shown as milliseconds.
_MS = 1e3
_HOUR_S = 3600.0

#: Title, the figure, and how it is written.
_ROWS: Sequence[tuple[str, Callable[[Figures], float], str]] = (
    ("SLO attainment", lambda f: f.slo_attainment, ".4f"),
    ("TTFT p50, ms", lambda f: f.ttft_p50_s * _MS, ".1f"),
    ("TTFT p95, ms", lambda f: f.ttft_p95_s * _MS, ".1f"),
    ("TTFT p99, ms", lambda f: f.ttft_p99_s * _MS, ".1f"),
    ("TPOT p50, ms", lambda f: f.tpot_p50_s * _MS, ".2f"),
    ("TPOT p99, ms", lambda f: f.tpot_p99_s * _MS, ".2f"),
    ("tasks per held node-second", lambda f: f.tasks_per_held_node_s, ".3f"),
    ("held node-hours", lambda f: f.held_node_s / _HOUR_S, ".4f"),
    ("nodes used", lambda f: f.nodes_used, ".0f"),
    ("utilisation", lambda f: f.utilisation, ".3f"),
    ("output tokens/s", lambda f: f.output_tokens_per_s, ".1f"),
    ("trained tokens/s", lambda f: f.trained_tokens_per_s, ".1f"),
    ("requests", lambda f: f.num_requests, ".0f"),
    ("rejected", lambda f: f.num_rejected, ".0f"),
    ("unfinished", lambda f: f.num_unfinished, ".0f"),
    ("simulated seconds", lambda f: f.ended_s, ".1f"),
)


def shown(values: Spread, form: str) -> str:
    """A median, with the smallest and largest value of the seeds in brackets where they differ."""
    median, lowest, highest = (_one(value, form) for value in values)
    return median if lowest == highest else f"{median} ({lowest}-{highest})"


def _one(value: float, form: str) -> str:
    return "never" if value == math.inf else format(value, form)


def print_figures(console: Console, title: str, runs: Mapping[str, Sequence[Figures]]) -> None:
    """One column per policy, every figure over its seeds; as many tables below each other as it takes."""
    say(console, title)
    columns = {name: _cells(figures) for name, figures in runs.items()}
    if len(runs) > 1:
        # Side by side there is no room for a median and its range on one line.
        columns = {name: [cell.replace(" ", "\n") for cell in cells] for name, cells in columns.items()}
    for names in _beside(columns, console.width):
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
        table.add_column("", no_wrap=True)
        for name in names:
            table.add_column(name, justify="right", overflow="fold")
        for index, (row_title, _, _) in enumerate(_ROWS):
            table.add_row(row_title, *(columns[name][index] for name in names))
        console.print(table)


def _cells(figures: Sequence[Figures]) -> list[str]:
    return [shown(spread([figure(f) for f in figures]), form) for _, figure, form in _ROWS]


def _beside(columns: Mapping[str, Sequence[str]], width: int) -> list[list[str]]:
    """The names of the columns, in order, by tables that are at most so wide, or have one column."""
    titles = max(len(title) for title, _, _ in _ROWS) + 2
    tables: list[list[str]] = []
    left = 0
    for name, cells in columns.items():
        own = 1 + max(len(line) for cell in (name, *cells) for line in cell.splitlines())
        if not tables or own > left:
            tables.append([])
            left = width - titles
        tables[-1].append(name)
        left -= own
    return tables


def print_loads(console: Console, title: str, loads: Sequence[NodeLoad], most: int = 16) -> None:
    """What every node did, the first `most` of them."""
    say(console, title)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    for name in ("node", "requests", "micro-batches", "serving", "training"):
        table.add_column(name, justify="left" if name == "node" else "right")
    for load in loads[:most]:
        table.add_row(
            load.node_id,
            str(load.requests),
            str(load.microbatches),
            f"{load.serving_share:.3f}",
            f"{load.training_share:.3f}",
        )
    console.print(table)
    if len(loads) > most:
        say(console, f"and {len(loads) - most} more nodes")


def demand_line(demand: Demand) -> str:
    """What the work asks for at least."""
    if demand.serving_nodes == math.inf:
        return "all requests arrive at once: no steady demand"
    training = "all that is left" if demand.training_nodes == math.inf else f"{demand.training_nodes:.2f}"
    return f"the work keeps at least {demand.serving_nodes:.2f} nodes busy with serving, {training} with training"


def probe_line(label: str, flaw: str, figures: Sequence[Figures]) -> str:
    """One probe of a search; `flaw`: what is not good enough, empty: nothing."""
    attainment = shown(spread([f.slo_attainment for f in figures]), ".4f")
    ttft = shown(spread([f.ttft_p99_s * _MS for f in figures]), ".1f")
    trained = shown(spread([f.trained_tokens_per_s for f in figures]), ".1f")
    verdict = f"fails: {flaw}" if flaw else "ok"
    return f"{label:>16}  attainment {attainment}  TTFT p99 {ttft} ms  trained {trained} tokens/s  {verdict}"


def say(console: Console, line: str) -> None:
    """A line as it is."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)
