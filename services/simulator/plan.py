"""What-if searches over simulations: the fewest nodes that keep a promise, the most training that leaves it whole.

A search does not trust that more is better: it halves intervals, which assumes it, then looks at neighbours of the
answer, and says when what it saw contradicts the assumption. It stops, with what it knows by then, when its budget is
spent.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


class OutOfBudget(Exception):
    """No further probe may be made."""


@dataclass(slots=True)
class Search:
    """Probes made so far. `look` simulates one value and says whether it is good enough.

    out_of_time: whether the deadline is over; looked at before every probe.
    """

    look: Callable[[float], bool]
    max_probes: int = 32
    out_of_time: Callable[[], bool] = lambda: False
    probes: dict[float, bool] = field(default_factory=dict)
    #: Whether the search came to its end.
    finished: bool = False

    def passes(self, value: float) -> bool:
        """Whether a value is good enough; looks at it at most once. Raises OutOfBudget."""
        if value not in self.probes:
            if len(self.probes) >= self.max_probes or self.out_of_time():
                raise OutOfBudget
            self.probes[value] = self.look(value)
        return self.probes[value]

    @contextmanager
    def budget(self) -> Iterator[None]:
        """Look at values in here; leaving it early for want of budget is no error."""
        try:
            yield
        except OutOfBudget:
            return
        self.finished = True

    def good(self) -> list[float]:
        """Values that are good enough, rising."""
        return sorted(value for value, passed in self.probes.items() if passed)

    def bad(self) -> list[float]:
        """Values that are not, rising."""
        return sorted(value for value, passed in self.probes.items() if not passed)


@dataclass(frozen=True, slots=True)
class Answer:
    """`value`: the best value seen, None: none was good enough. next_worse: the nearest value seen to fail beside it.

    monotone: no probe contradicts that more is better. finished: the search was not cut short by its budget.
    """

    value: float | None
    next_worse: float | None
    monotone: bool
    finished: bool


def fewest(search: Search, most: int) -> Answer:
    """The smallest whole number from 1 to `most` that is good enough, if larger ones are better."""
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    with search.budget():
        _find_fewest(search, most)
    good, bad = search.good(), search.bad()
    value = good[0] if good else None
    below = [other for other in bad if value is None or other < value]
    return Answer(value, below[-1] if below else None, not (good and bad and bad[-1] > good[0]), search.finished)


def most(search: Search, highest: Callable[[], float], *, tolerance: float) -> Answer:
    """The largest rate from 0 that is good enough, if smaller ones are better; infinite: no rate is too much.

    `highest`: a finite rate that asks for all there is, known once the infinite rate has been looked at. tolerance: the
    answer is within this share of the smallest rate that failed.
    """
    if not 0.0 < tolerance < 1.0:
        raise ValueError(f"tolerance must be between 0 and 1, got {tolerance}")
    with search.budget():
        _find_most(search, highest, tolerance)
    good, bad = search.good(), search.bad()
    value = good[-1] if good else None
    above = [other for other in bad if value is None or other > value]
    return Answer(value, above[0] if above else None, not (good and bad and bad[0] < good[-1]), search.finished)


def _find_fewest(search: Search, most: int) -> None:
    low, high = 0, 1
    while not search.passes(high):
        if high == most:
            return
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        if search.passes(middle):
            high = middle
        else:
            low = middle
    # One below failed, or there is none. The next on either side would show that more is not better.
    for value in (high - 2, high + 1):
        if 1 <= value <= most:
            search.passes(value)


def _find_most(search: Search, highest: Callable[[], float], tolerance: float) -> None:
    if not search.passes(0.0):
        search.passes(math.inf)  # nodes that train serve too: more training can be better
        return
    if search.passes(math.inf):
        return
    low, everything = 0.0, highest()
    high = everything
    while high - low > tolerance * high and high > tolerance * everything:
        middle = (low + high) / 2
        if search.passes(middle):
            low = middle
        else:
            high = middle
    # Between what passed and 0, and between what failed and everything: would show that less is not better.
    if low:
        search.passes(0.75 * low)
    if high < everything:
        search.passes((high + everything) / 2)
