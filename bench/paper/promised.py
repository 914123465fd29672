"""The least held node time of a policy that keeps its word: so many promises, no response and no end later than said.

`clairvoyant_node_s` lets every request wait for as long as it likes. This bound does not. It is the optimum of a mixed-
integer program of which every schedule is a solution that costs no more than its held time; so no schedule holds less.
It assumes what that bound assumes (`services.simulator.clairvoyant`), and is never below it.

**Held time.** Take from every interval in which a node is held its last `hold_s`; a(t) counts the intervals that
contain t then. The held time is the integral of a plus `hold_s` for every interval, since each ends once. a is a whole
number, at most the number of nodes, and at least the number of nodes whose stage works at t. It is at least 1 while a
request is unserved, so from its arrival for as long as it takes alone.

**Blocks.** Time from the first arrival to the end of the last task is cut into blocks. v is a at their edges, 0 at both
ends; in a block `opened` intervals begin and `closed` end: whole numbers with v_next = v + opened - closed. Within the
block a is nowhere below v - closed nor above v + opened. The cost is the integral of a plus `hold_s` x closed.

**Slots.** Blocks are cut into slots. Of a only the mean over the slot is a variable, and so is the work that one stage
does in it for kept requests, for late ones and for training; together at most the mean of a times the slot. That
forgets that a task runs on one node, in one piece and not on several at once, and what the other stages do.

**Windows.** Request i is kept by a share x_i from 0 to 1, at least `kept` in sum. Its work on the stage lies after its
arrival and the stages before it, and before its latest end less the stages after it; the latest end is the promise for
x_i of the work and the latest response for the rest. A request that misses its promise even alone has x_i = 0. Of the
windows two facts are used, for kept and late ones apart: until any time no more work is done than has been released,
and at least as much as was due. Releases count from the beginning of their slot, due times until its end. Training
may run at any time from its arrival to the end.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from bench.paper.program import Floats, Places, Program
from services.simulator.clairvoyant import Demand, clairvoyant_node_s

#: Blocks per `hold_s`, and in all; so many releases and due times cut them into slots. Twice as many of either changed
#: the bound by less than 0.2 % (mean of 11 points of the grid).
_BLOCKS_PER_HOLD, _MAX_BLOCKS, _MAX_CUTS = 2, 200, 150
#: Of a block.
_LEAST_SLOT = 1e-3
#: How far the search for whole numbers goes; what it leaves open only lowers the bound.
_GAP, _MAX_NODES = 0.02, 50
#: Room for rounding, so that what a simulation just reached is not impossible.
_ROOM = 1e-6


@dataclass(frozen=True, slots=True)
class Terms:
    """What a policy did or is to do: `kept` requests end within `slo_s` of their arrival, all requests within
    `worst_response_s`, and the last task by `makespan_s`."""

    slo_s: float
    kept: int
    makespan_s: float
    worst_response_s: float = math.inf


def promised_node_s(tasks: Sequence[Demand], terms: Terms, *, nodes: int, hold_s: float) -> float:
    """The bound, node-seconds; 0 without tasks. Raises InfeasibleError when no policy can keep the terms, ValueError
    when they name no end."""
    if not math.isfinite(terms.makespan_s):
        raise ValueError(f"makespan_s must be finite, got {terms.makespan_s}")
    if not tasks:
        return 0.0
    bound_s = _Model(tasks, terms, hold_s).bound_s(nodes, hold_s) * (1.0 - _ROOM)
    return max(bound_s, clairvoyant_node_s(tasks, hold_s))


@dataclass(frozen=True, slots=True)
class _Windows:
    """When the work of tasks on the stage may be done. `work_s` is there in any case, and as many times `per_share_s`
    as its column of `shares` says."""

    release_s: Floats
    due_s: Floats
    work_s: Floats
    per_share_s: Floats
    shares: Places


class _Model:
    """The program, for the fullest stage."""

    def __init__(self, tasks: Sequence[Demand], terms: Terms, hold_s: float) -> None:
        self._program, self._terms = Program(), terms
        self._requests = [task for task in tasks if task.is_request]
        self._training = [task for task in tasks if not task.is_request]
        self._stage = int(np.argmax(np.sum([task.stage_s for task in tasks], axis=0)))
        self._begin_s = min(task.arrival_s for task in tasks)
        self._end_s = max(terms.makespan_s, self._begin_s) * (1.0 + _ROOM) + _ROOM
        windows = [*self._request_windows(), self._training_windows()]
        self._blocks = self._block_edges(hold_s)
        self._edges = self._slot_edges(windows)
        self._work = [self._flow(window) for window in windows]

    def bound_s(self, nodes: int, hold_s: float) -> float:
        """The least cost."""
        widths = np.diff(self._edges)
        mean = self._program.variables(len(widths), lower=self._served_share(), upper=nodes, cost=widths)
        rows = self._program.rows(len(widths), most=0.0)
        self._program.add(rows, mean, -widths)
        for done in self._work:
            self._program.add(rows, done, 1.0)
        self._intervals(mean, nodes, hold_s)
        return self._program.least_cost(gap=_GAP, max_nodes=_MAX_NODES)

    def _request_windows(self) -> tuple[_Windows, _Windows]:
        """Of kept and of late requests."""
        arrival_s = _array(task.arrival_s for task in self._requests)
        alone_s = _array(sum(task.stage_s) for task in self._requests)
        before_s = _array(sum(task.stage_s[: self._stage]) for task in self._requests)
        after_s = _array(sum(task.stage_s[self._stage + 1 :]) for task in self._requests)
        work_s = _array(task.stage_s[self._stage] for task in self._requests)
        can_keep = alone_s <= self._terms.slo_s * (1.0 + _ROOM)
        shares = self._program.variables(len(self._requests), upper=can_keep.astype(np.float64))
        self._program.add(np.zeros_like(shares) + self._program.rows(1, least=float(self._terms.kept)), shares, 1.0)
        release_s = arrival_s + before_s
        late_due_s = np.minimum(arrival_s + self._terms.worst_response_s, self._end_s) - after_s
        kept_due_s = np.minimum(arrival_s + self._terms.slo_s - after_s, late_due_s)
        none_s = np.zeros_like(work_s)
        return (
            _Windows(release_s, kept_due_s, none_s, work_s, shares),
            _Windows(release_s, late_due_s, work_s, -work_s, shares),
        )

    def _training_windows(self) -> _Windows:
        release_s = _array(task.arrival_s for task in self._training)
        work_s = _array(task.stage_s[self._stage] for task in self._training)
        nothing = np.zeros(0, dtype=np.int64)
        return _Windows(release_s, np.full_like(release_s, self._end_s), work_s, np.zeros(0), nothing)

    def _block_edges(self, hold_s: float) -> Floats:
        span_s = self._end_s - self._begin_s
        wanted = math.ceil(_BLOCKS_PER_HOLD * span_s / hold_s) if hold_s > 0.0 else _MAX_BLOCKS
        return np.linspace(self._begin_s, self._end_s, min(wanted, _MAX_BLOCKS) + 1)

    def _slot_edges(self, windows: Sequence[_Windows]) -> Floats:
        events = np.unique(np.concatenate([times for window in windows for times in (window.release_s, window.due_s)]))
        # The solver takes slots near its tolerances for contradictions. Fewer cuts only lower the bound.
        least_s = _LEAST_SLOT * (self._blocks[1] - self._blocks[0])
        events = events[(events > self._begin_s) & (events < self._end_s)]
        after = np.searchsorted(self._blocks, events)
        apart_s = np.minimum(events - self._blocks[after - 1], self._blocks[after] - events)
        events = events[apart_s > least_s]
        events = events[np.diff(events, prepend=-math.inf) > least_s]
        chosen = np.linspace(0, len(events) - 1, min(len(events), _MAX_CUTS)).round().astype(np.int64)
        return np.unique(np.concatenate([self._blocks, events[chosen]]))

    def _flow(self, window: _Windows) -> Places:
        """Work done per slot: released, not yet done (`open`) and done, not yet due (`ahead`) are never negative."""
        count = len(self._edges) - 1
        released = np.clip(np.searchsorted(self._edges, window.release_s, "right") - 1, 0, count - 1)
        due = np.clip(np.searchsorted(self._edges, window.due_s, "left") - 1, released, count - 1)
        done = self._program.variables(count)
        for slots, sign in ((released, 1.0), (due, -1.0)):
            fixed_s = sign * np.bincount(slots, window.work_s, count).astype(np.float64)
            waiting = self._program.variables(count)
            rows = self._program.rows(count, least=fixed_s, most=fixed_s)
            self._program.add(rows, waiting, 1.0)
            self._program.add(rows[1:], waiting[:-1], -1.0)
            self._program.add(rows, done, sign)
            if len(window.shares):
                self._program.add(rows[slots], window.shares, -sign * window.per_share_s)
        return done

    def _served_share(self) -> Floats:
        """Of every slot, the share in which some request is unserved whatever is done."""
        begins_s, ends_s = self._edges[:-1], self._edges[1:]
        covered_s, until_s = np.zeros(len(begins_s)), -math.inf
        for task in sorted(self._requests, key=lambda task: task.arrival_s):
            begin_s, end_s = max(task.arrival_s, until_s), task.arrival_s + sum(task.stage_s)
            if end_s > begin_s:
                covered_s += np.maximum(0.0, np.minimum(ends_s, end_s) - np.maximum(begins_s, begin_s))
                until_s = end_s
        return np.minimum(1.0, covered_s / (ends_s - begins_s))

    def _intervals(self, mean: Places, nodes: int, hold_s: float) -> None:
        """Held intervals begin and end, whole ones, and the end of each costs `hold_s`."""
        count = len(self._blocks) - 1
        most = np.full(count + 1, float(nodes))
        most[[0, -1]] = 0.0
        at_edge = self._program.variables(count + 1, upper=most, integer=True)
        opened = self._program.variables(count, integer=True)
        closed = self._program.variables(count, cost=hold_s, integer=True)
        rows = self._program.rows(count, least=0.0, most=0.0)
        for columns, factor in ((at_edge[1:], 1.0), (at_edge[:-1], -1.0), (opened, -1.0), (closed, 1.0)):
            self._program.add(rows, columns, factor)
        block = np.searchsorted(self._blocks, self._edges[:-1], "right") - 1
        for changed, limits in ((opened, {"most": 0.0}), (closed, {"least": 0.0})):
            rows = self._program.rows(len(mean), **limits)
            self._program.add(rows, mean, 1.0)
            self._program.add(rows, at_edge[block], -1.0)
            self._program.add(rows, changed[block], -1.0 if changed is opened else 1.0)


def _array(values: Iterable[float]) -> Floats:
    return np.array(list(values), dtype=np.float64)
