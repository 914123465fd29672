"""Runs with training off that tell whether a cluster serves a rate, no more of them than needed."""

from collections.abc import Callable
from dataclasses import replace

from bench.colocation.capacity import Capacity, find_capacity
from bench.colocation.config import CAPACITY_ATTAINMENT, ColocationConfig
from bench.colocation.figures import attainment
from bench.colocation.measure import Measured
from bench.colocation.scenario import Run, rows

#: Length of a run that is only to tell what is far too much, seconds.
_GLANCE_S = 30.0


def capacity_of(
    config: ColocationConfig,
    run_at: Callable[[float, int], Run],
    simulate: Callable[[Run], Measured],
    say: Callable[[float, float], None],
) -> Capacity:
    """Of the cluster whose run at a rate, with a seed, `run_at` gives. `say` hears every rate and its attainment."""

    def glance_at(rate: float) -> float:
        run = run_at(rate, config.seeds[0])
        return attainment([simulate(replace(run, seconds=min(_GLANCE_S, run.seconds)))])

    def attainment_at(rate: float) -> float:
        found = most_attained([run_at(rate, seed) for seed in config.seeds], CAPACITY_ATTAINMENT, simulate)
        say(rate, found)
        return found

    return find_capacity(glance_at, attainment_at, CAPACITY_ATTAINMENT, config.tolerance)


def most_attained(runs: list[Run], wanted: float, simulate: Callable[[Run], Measured]) -> float:
    """Attainment over all runs. Once it cannot reach `wanted` any more the others are left out: then an upper bound."""
    num_requests = sum(len(rows(run)) for run in runs)
    num_missed = 0
    for run in runs:
        measured = simulate(run)
        num_missed += measured.num_requests - measured.num_kept
        if num_requests - num_missed < wanted * num_requests:
            break
    return (num_requests - num_missed) / num_requests
