"""Independent simulations on all cores. What comes back depends on the runs only, never on the pool."""

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from bench.paper.outcome import row
from bench.paper.scenario import Run


def rows(runs: Sequence[Run], processes: int, on_done: Callable[[int, Run], None]) -> list[dict[str, Any]]:
    """Figures of every run, in the order of the runs. `on_done` hears how many are done, and which was the last."""
    if processes == 1:
        return _one_by_one(runs, on_done)
    results: list[dict[str, Any]] = [{}] * len(runs)
    # spawn: a forked child would inherit the threads of the progress bar in an undefined state.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, len(runs)), mp_context=context, initializer=_ignore_interrupts)
    try:
        # The longest first, so that no core is left with one of them at the end.
        order = sorted(range(len(runs)), key=lambda index: -runs[index].num_tasks)
        places = {pool.submit(row, runs[index]): index for index in order}
        for num_done, future in enumerate(as_completed(places), start=1):
            index = places[future]
            results[index] = future.result()
            on_done(num_done, runs[index])
    finally:
        # Not the pool's own context manager, which would run everything that waits before it passes an error on.
        pool.shutdown(cancel_futures=True)
    return results


def _one_by_one(runs: Sequence[Run], on_done: Callable[[int, Run], None]) -> list[dict[str, Any]]:
    results = []
    for run in runs:
        results.append(row(run))
        on_done(len(results), run)
    return results


def _ignore_interrupts() -> None:
    """Ctrl-C reaches the whole process group; the parent stops the pool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
