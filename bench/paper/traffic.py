"""The tasks of a run: when they arrive, how long they are, which of them train."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

from services.scheduler.core.types import SloTarget
from services.simulator.arrivals import bursty
from services.simulator.lengths import LogNormal, ordered
from services.simulator.types import Microbatch, Request, Work

DAY_S = 86_400.0
#: Halvings of a day when the time of an arrival is looked for: to the microsecond.
_HALVINGS = 40


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of prompts and training examples, tokens, in one of `services.simulator.lengths.ORDERS`."""

    shape: LogNormal
    order: str = "random"


#: Of the grid: mean 250, standard deviation 150 tokens.
LENGTHS = Lengths(LogNormal.of(250, 150, shortest=8, longest=1024))


def spread_lengths(factor: float) -> Lengths:
    """The grid's lengths with their standard deviation times `factor`."""
    return Lengths(LogNormal.of(250, 150 * factor, shortest=8, longest=1024))


def tasks(
    name: str,
    num_tasks: int,
    rate: float,
    training_share: float,
    slo: SloTarget,
    lengths: Lengths,
    outputs: LogNormal | None,
    *,
    swing: float,
    cv: float,
) -> list[Work]:
    """Tasks drawn from a seed, `name`. outputs: tokens that requests yield; None: one each.

    Neither the order of lengths nor the outputs change anything else of the input.
    """
    random = Random(name)
    drawn: list[tuple[float, int, bool]] = []
    for at_s in islice(arrivals(random, rate, swing=swing, cv=cv), num_tasks):
        drawn.append((at_s, lengths.shape.draw(random), random.random() < training_share))
    in_order = ordered([length for _, length, _ in drawn], lengths.order, Random(f"{name}/order"))
    output_random = Random(f"{name}/outputs")
    result: list[Work] = []
    for index, ((at_s, _, trains), length) in enumerate(zip(drawn, in_order, strict=True)):
        if trains:
            result.append(Microbatch(f"m{index}", at_s, "job", 1, length))
        elif outputs is None:
            result.append(Request(f"r{index}", at_s, length, 1, 1, slo))
        else:
            result.append(Request(f"r{index}", at_s, length, outputs.draw(output_random), outputs.longest, slo))
    return result


def arrivals(random: Random, rate: float, *, swing: float, cv: float) -> Iterator[float]:
    """Gamma distributed gaps (cv 1: Poisson), with a rate of rate * (1 + swing * sin) over a day. swing 0-1."""
    if not swing:
        return bursty(random, rate, cv=cv)
    # The process runs on a clock of its own, which goes faster by day.
    return (_at_s(mean_s, swing) for mean_s in bursty(random, rate, cv=cv))


def _at_s(mean_s: float, swing: float) -> float:
    """The time by which a rate of 1 * (1 + swing * sin) has brought what a rate of 1 brings in `mean_s`."""
    days, rest_s = divmod(mean_s, DAY_S)
    low_s, high_s = 0.0, DAY_S
    for _ in range(_HALVINGS):
        middle_s = (low_s + high_s) / 2
        turn = 2.0 * math.pi * middle_s / DAY_S
        if middle_s + swing * DAY_S / (2.0 * math.pi) * (1.0 - math.cos(turn)) < rest_s:
            low_s = middle_s
        else:
            high_s = middle_s
    return days * DAY_S + (low_s + high_s) / 2
