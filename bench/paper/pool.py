"""Independent simulations and bounds on all cores. What comes back depends on the jobs only, never on the pool."""

from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from typing import Any

from bench.paper.limits import Job, Limit
from bench.paper.outcome import row
from bench.paper.scenario import DECODE
from services.simulator.pool import workers

#: What a session and a decoded request cost, in prefills. Measured, and only to put the longest runs first.
_SESSION, _DECODED = 100, 3


def rows(jobs: Sequence[Job], processes: int, on_done: Callable[[int, Job], None]) -> list[dict[str, Any]]:
    """Figures of every job, in the order of the jobs. `on_done` hears how many are done, and which was the last."""
    if processes == 1:
        return _one_by_one(jobs, on_done)
    results: list[dict[str, Any]] = [{}] * len(jobs)
    with workers(min(processes, len(jobs))) as pool:
        # The longest first, so that no core is left with one of them at the end.
        order = sorted(range(len(jobs)), key=lambda index: -_length(jobs[index]))
        places = {pool.submit(_row, jobs[index]): index for index in order}
        for num_done, future in enumerate(as_completed(places), start=1):
            index = places[future]
            results[index] = future.result()
            on_done(num_done, jobs[index])
    return results


def _row(job: Job) -> dict[str, Any]:
    return job.row() if isinstance(job, Limit) else row(job)


def _length(job: Job) -> int:
    """How long a job roughly takes, in prefills."""
    if isinstance(job, Limit):
        return job.num_tasks
    if job.simulation is not None:
        return _SESSION * job.num_tasks
    return (_DECODED if job.mode == DECODE else 1) * job.num_tasks


def _one_by_one(jobs: Sequence[Job], on_done: Callable[[int, Job], None]) -> list[dict[str, Any]]:
    results = []
    for job in jobs:
        results.append(_row(job))
        on_done(len(results), job)
    return results
