"""Independent simulations on all cores. What comes back depends on the runs only, never on the pool."""

from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from typing import Any

from bench.paper.outcome import row
from bench.paper.scenario import Run
from services.simulator.pool import workers


def rows(runs: Sequence[Run], processes: int, on_done: Callable[[int, Run], None]) -> list[dict[str, Any]]:
    """Figures of every run, in the order of the runs. `on_done` hears how many are done, and which was the last."""
    if processes == 1:
        return _one_by_one(runs, on_done)
    results: list[dict[str, Any]] = [{}] * len(runs)
    with workers(min(processes, len(runs))) as pool:
        # The longest first, so that no core is left with one of them at the end.
        order = sorted(range(len(runs)), key=lambda index: -runs[index].num_tasks)
        places = {pool.submit(row, runs[index]): index for index in order}
        for num_done, future in enumerate(as_completed(places), start=1):
            index = places[future]
            results[index] = future.result()
            on_done(num_done, runs[index])
    return results


def _one_by_one(runs: Sequence[Run], on_done: Callable[[int, Run], None]) -> list[dict[str, Any]]:
    results = []
    for run in runs:
        results.append(row(run))
        on_done(len(results), run)
    return results
