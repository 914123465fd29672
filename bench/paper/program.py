"""A mixed-integer linear program, put together in groups of variables and rows, and the bound that HiGHS proves."""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

Floats = NDArray[np.float64]
Places = NDArray[np.int64]

#: HiGHS's statuses with a bound: optimal, and stopped at the limit of nodes.
_BOUNDED, _INFEASIBLE = (0, 1), 2


class InfeasibleError(ValueError):
    """No values satisfy all rows."""


@dataclass(slots=True)
class Program:
    """Minimise the cost; every group of variables is given out as an array of its columns."""

    _lower: list[Floats] = field(default_factory=list)
    _upper: list[Floats] = field(default_factory=list)
    _cost: list[Floats] = field(default_factory=list)
    _integer: list[Floats] = field(default_factory=list)
    _entries: list[tuple[Places, Places, Floats]] = field(default_factory=list)
    _least: list[Floats] = field(default_factory=list)
    _most: list[Floats] = field(default_factory=list)
    _num_columns: int = 0
    _num_rows: int = 0

    def variables(
        self,
        count: int,
        *,
        lower: Floats | float = 0.0,
        upper: Floats | float = math.inf,
        cost: Floats | float = 0.0,
        integer: bool = False,
    ) -> Places:
        """Columns of `count` new variables."""
        for values, given in ((self._lower, lower), (self._upper, upper), (self._cost, cost)):
            values.append(np.broadcast_to(np.asarray(given, dtype=np.float64), (count,)))
        self._integer.append(np.full(count, float(integer)))
        self._num_columns += count
        return np.arange(self._num_columns - count, self._num_columns)

    def rows(self, count: int, *, least: Floats | float = -math.inf, most: Floats | float = math.inf) -> Places:
        """`count` new rows: the sum of their terms is from `least` to `most`."""
        for values, given in ((self._least, least), (self._most, most)):
            values.append(np.broadcast_to(np.asarray(given, dtype=np.float64), (count,)))
        self._num_rows += count
        return np.arange(self._num_rows - count, self._num_rows)

    def add(self, rows: Places, columns: Places, coefficients: Floats | float) -> None:
        """Row by row a term more. Entries for the same row and column add up."""
        values = np.broadcast_to(np.asarray(coefficients, dtype=np.float64), rows.shape)
        self._entries.append((rows, columns, values))

    def least_cost(self, *, gap: float, max_nodes: int) -> float:
        """What no solution is below: the optimum, less `gap` of it or more when `max_nodes` of the search were too few.

        The same on every run, for no clock is involved. Raises InfeasibleError when there is no solution.
        """
        rows, columns, values = (np.concatenate(part) for part in zip(*self._entries, strict=True))
        matrix = csr_array((values, (rows, columns)), shape=(self._num_rows, self._num_columns))
        with _silenced():
            found: Any = milp(
                np.concatenate(self._cost),
                integrality=np.concatenate(self._integer),
                bounds=Bounds(np.concatenate(self._lower), np.concatenate(self._upper)),
                constraints=LinearConstraint(matrix, np.concatenate(self._least), np.concatenate(self._most)),
                options={"mip_rel_gap": gap, "node_limit": max_nodes},
            )
        if found.status == _INFEASIBLE:
            raise InfeasibleError("no solution")
        # Without whole numbers there is no search, and the optimum is the bound.
        bound = found.fun if found.mip_dual_bound is None else found.mip_dual_bound
        if found.status not in _BOUNDED or bound is None:
            raise ArithmeticError(f"the solver gave up: {found.message}")
        return float(bound)


@contextmanager
def _silenced() -> Iterator[None]:
    """HiGHS writes left-over debugging lines to the standard output of the process, whatever it is told."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
