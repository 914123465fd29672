"""The tasks of a run: when they arrive, how long they are, which of them train."""

from dataclasses import dataclass
from itertools import islice
from random import Random

from services.scheduler.core.tasks import SloTarget
from services.simulator.arrivals import daily
from services.simulator.lengths import LogNormal, ordered
from services.simulator.types import Microbatch, Request, Work


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
    for at_s in islice(daily(random, rate, swing=swing, cv=cv), num_tasks):
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
