"""Independent simulations on all cores. What comes back depends on the runs only, never on the pool."""

from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from typing import Any

from bench.paper.outcome import row
from bench.paper.scenario import DECODE, Run
from services.simulator.pool import workers

#: What a session and a decoded request cost, in prefills. Measured, and only to put the longest runs first.
_SESSION, _DECODED = 100, 3


def rows(runs: Sequence[Run], processes: int, on_done: Callable[[int, Run], None]) -> list[dict[str, Any]]:
    """Figures of every run, in the order of the runs. `on_done` hears how many are done, and which was the last."""
    if processes == 1:
        return _one_by_one(runs, on_done)
    results: list[dict[str, Any]] = [{}] * len(runs)
    with workers(min(processes, len(runs))) as pool:
        # The longest first, so that no core is left with one of them at the end.
        order = sorted(range(len(runs)), key=lambda index: -_length(runs[index]))
        places = {pool.submit(row, runs[index]): index for index in order}
        for num_done, future in enumerate(as_completed(places), start=1):
            index = places[future]
            results[index] = future.result()
            on_done(num_done, runs[index])
    return results


def _length(run: Run) -> int:
    """How long a run roughly takes, in prefills."""
    if run.simulation is not None:
        return _SESSION * run.num_tasks
    return (_DECODED if run.mode == DECODE else 1) * run.num_tasks


def _one_by_one(runs: Sequence[Run], on_done: Callable[[int, Run], None]) -> list[dict[str, Any]]:
    results = []
    for run in runs:
        results.append(row(run))
        on_done(len(results), run)
    return results
