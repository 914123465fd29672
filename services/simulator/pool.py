"""The same scenario with several seeds, on several cores. What comes back depends on scenario and seeds only."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager

from services.simulator.figures import Figures
from services.simulator.scenario import Scenario, simulate

#: Simulates a scenario with every seed; hears before each, or when each is done where they run side by side.
Simulate = Callable[[Scenario, Sequence[int], Callable[[int], None]], list[Figures]]


@contextmanager
def simulations(processes: int) -> Iterator[Simulate]:
    """What simulates `processes` seeds at a time. Leaving it early drops what has not begun."""
    if processes == 1:
        yield _one_by_one
        return

    def side_by_side(scenario: Scenario, seeds: Sequence[int], on_seed: Callable[[int], None]) -> list[Figures]:
        seed_of = {pool.submit(simulate, scenario, seed): seed for seed in seeds}
        done = {}
        for future in as_completed(seed_of):
            seed = seed_of[future]
            done[seed] = future.result()
            on_seed(seed)
        return [done[seed] for seed in seeds]

    with workers(processes) as pool:
        yield side_by_side


@contextmanager
def workers(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for simulations. Leaving it, also by an error, drops what has not begun; Ctrl-C is the parent's."""
    # spawn: a forked child would inherit the threads of the progress bar in an undefined state.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_ignore_interrupts)
    try:
        yield pool
    finally:
        # Not the pool's own context manager, which would run everything that waits before it passes an error on.
        pool.shutdown(cancel_futures=True)


def _one_by_one(scenario: Scenario, seeds: Sequence[int], on_seed: Callable[[int], None]) -> list[Figures]:
    figures = []
    for seed in seeds:
        on_seed(seed)
        figures.append(simulate(scenario, seed))
    return figures


def _ignore_interrupts() -> None:
    """Ctrl-C reaches the whole process group; the parent stops the pool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
