"""The bound that knows promises: nothing that a schedule with the same promises reaches lies below it."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.paper import promised, scenario
from bench.paper.program import InfeasibleError, Program
from bench.paper.promised import Terms, promised_node_s
from bench.paper.scenario import Point, Run
from services.simulator.clairvoyant import Demand, clairvoyant_node_s, demands
from services.simulator.metrics import measure

_SLO_S, _NODES = 3.0, 2


@dataclass(frozen=True)
class _Outcome:
    held_s: float
    terms: Terms


def _schedule(tasks: list[Demand], order: tuple[int, ...], split: tuple[int, ...], hold_s: float) -> _Outcome:
    """Tasks one after the other through the stages of their nodes, in the order given. Requests hold their node from
    their arrival, micro-batches from their begin."""
    free_s = [[-math.inf] * len(tasks[0].stage_s) for _ in range(_NODES)]
    stays: list[list[tuple[float, float]]] = [[] for _ in range(_NODES)]
    responses_s = []
    for index in order:
        task, stages = tasks[index], free_s[split[index]]
        at_s = begin_s = max(task.arrival_s, stages[0])
        for stage, work_s in enumerate(task.stage_s):
            at_s = stages[stage] = max(at_s, stages[stage]) + work_s
        stays[split[index]].append((task.arrival_s if task.is_request else begin_s, at_s))
        if task.is_request:
            responses_s.append(at_s - task.arrival_s)
    kept = sum(response_s <= _SLO_S for response_s in responses_s)
    end_s = max(end_s for node in stays for _, end_s in node)
    return _Outcome(
        sum(_held_s(node, hold_s) for node in stays), Terms(_SLO_S, kept, end_s, max(responses_s, default=0.0))
    )


def _held_s(stays: list[tuple[float, float]], hold_s: float) -> float:
    total_s, until_s = 0.0, -math.inf
    for begin_s, end_s in sorted(stays):
        total_s += max(0.0, end_s + hold_s - max(begin_s, until_s))
        until_s = max(until_s, end_s + hold_s)
    return total_s


def _every_schedule(tasks: list[Demand], hold_s: float) -> Iterator[_Outcome]:
    for order in itertools.permutations(range(len(tasks))):
        for split in itertools.product(range(_NODES), repeat=len(tasks)):
            yield _schedule(tasks, order, split, hold_s)


def _tasks(stages: int, most: int) -> st.SearchStrategy[list[Demand]]:
    stage_s = st.tuples(*[st.floats(0.1, 3)] * stages)
    return st.lists(st.builds(Demand, st.floats(0, 12), stage_s, st.booleans()), min_size=1, max_size=most)


_HOLDS = st.sampled_from([0.0, 1.0, 5.0])


@settings(deadline=None, max_examples=15)
@given(tasks=st.integers(1, 2).flatmap(lambda stages: _tasks(stages, 4)), hold_s=_HOLDS)
def test_no_schedule_of_a_small_instance_is_below_the_bound(tasks: list[Demand], hold_s: float) -> None:
    """For every number of promises, and for every latest end and response, the best of all schedules that keep them."""
    outcomes = list(_every_schedule(tasks, hold_s))
    for kept in {outcome.terms.kept for outcome in outcomes}:
        several = [outcome for outcome in outcomes if outcome.terms.kept >= kept]
        held_s = min(outcome.held_s for outcome in several)
        terms = Terms(_SLO_S, kept, max(outcome.terms.makespan_s for outcome in several))
        assert held_s >= promised_node_s(tasks, terms, nodes=_NODES, hold_s=hold_s) * (1 - 1e-6)
    for key in ("makespan_s", "worst_response_s"):
        best = min(outcomes, key=lambda outcome: (getattr(outcome.terms, key), outcome.held_s))
        assert best.held_s >= promised_node_s(tasks, best.terms, nodes=_NODES, hold_s=hold_s) * (1 - 1e-6)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), tasks=_tasks(2, 12), hold_s=_HOLDS)
def test_a_schedule_is_not_below_the_bound_for_what_it_did(data: st.DataObject, tasks: list[Demand], hold_s: float):
    order = tuple(data.draw(st.permutations(range(len(tasks)))))
    split = tuple(data.draw(st.lists(st.integers(0, 1), min_size=len(tasks), max_size=len(tasks))))
    outcome = _schedule(tasks, order, split, hold_s)
    bound_s = promised_node_s(tasks, outcome.terms, nodes=_NODES, hold_s=hold_s)
    assert outcome.held_s >= bound_s * (1 - 1e-6)
    assert bound_s >= clairvoyant_node_s(tasks, hold_s)


@pytest.mark.parametrize("policy", ["separate", "paper_ratio", "lemix"])
@pytest.mark.parametrize("point", [Point(8.0, 0.3, 0.06), Point(32.0, 0.5, 0.114)])
def test_no_policy_is_below_the_bound_for_what_it_did(policy: str, point: Point) -> None:
    run = Run(point, policy, 0, 150)
    slo_s = scenario.SLO_UNITS * run.unit_s
    found = measure(scenario.simulate(run), slo_s=slo_s, hold_s=scenario.HOLD_S)
    kept = round(found.slo_attainment * found.num_requests)
    terms = Terms(slo_s, kept, found.makespan_s, found.worst_response_slos * slo_s)
    tasks = demands(scenario.work(run), scenario.cluster(run))
    bound_s = promised_node_s(tasks, terms, nodes=run.nodes, hold_s=scenario.HOLD_S)
    assert found.held_node_s >= bound_s
    more = replace(terms, kept=0, makespan_s=10 * terms.makespan_s, worst_response_s=math.inf)
    assert promised_node_s(tasks, more, nodes=run.nodes, hold_s=scenario.HOLD_S) <= bound_s * (1 + promised._GAP)


def _request(arrival_s: float, *stage_s: float) -> Demand:
    return Demand(arrival_s, stage_s, True)


def _training(arrival_s: float, *stage_s: float) -> Demand:
    return Demand(arrival_s, stage_s, False)


@pytest.mark.parametrize(
    ("tasks", "terms", "bound_s"),
    [
        ([], Terms(1.0, 0, 9.0), 0.0),
        ([_request(0.0, 1.0)], Terms(1.0, 1, 1.0, 1.0), 1.0 + 10.0),  # the only way
        ([_request(0.0, 1.0)] * 2, Terms(1.0, 1, 9.0), 2.0 + 10.0),  # one after the other
        ([_request(0.0, 1.0)] * 2, Terms(1.0, 2, 9.0), 2.0 + 20.0),  # both at once
        ([_request(0.0, 1.0)] * 3, Terms(1.0, 2, 9.0), 3.0 + 20.0),  # the third may wait
        ([_request(0.0, 1.0)] * 4, Terms(1.0, 0, 9.0, 2.0), 4.0 + 20.0),  # nobody may wait longer than 2 s
        ([_training(0.0, 9.0)] * 4, Terms(1.0, 0, 36.0), 36.0 + 10.0),
        ([_training(0.0, 9.0)] * 4, Terms(1.0, 0, 18.0), 36.0 + 20.0),  # the end takes two nodes
        ([_training(0.0, 9.0)] * 4, Terms(1.0, 0, 35.9), 36.0 + 20.0),  # one and a bit are two
        (
            [_request(0.0, 1.0, 2.0)] * 2,
            Terms(3.0, 2, 9.0),
            1.0 + 4.0 + 20.0,
        ),  # one is held until the fullest stage is due
    ],
)
def test_bounds_worked_out_by_hand(tasks: list[Demand], terms: Terms, bound_s: float) -> None:
    assert promised_node_s(tasks, terms, nodes=4, hold_s=10.0) == pytest.approx(bound_s, rel=1e-4)


def test_promises_cost_nodes_only_when_they_are_made() -> None:
    """A burst each minute that takes two nodes: the second is held around the bursts, the first for the requests."""
    tasks = [_request(60.0 * burst, 1.0) for burst in range(5) for _ in range(2)]
    loose, strict = (promised_node_s(tasks, Terms(1.0, kept, 300.0), nodes=4, hold_s=10.0) for kept in (5, 10))
    assert loose == pytest.approx(5 * 12.0, rel=promised._GAP)
    assert strict == pytest.approx(10 * 11.0, rel=promised._GAP)


@pytest.mark.parametrize(
    "terms",
    [
        Terms(1.0, 3, 9.0),  # more promises than requests
        Terms(0.5, 1, 9.0),  # missed even alone
        Terms(1.0, 0, 0.9),  # over before two nodes are done
        Terms(1.0, 0, 9.0, 0.5),  # nobody answers that fast
    ],
)
def test_terms_that_nobody_can_keep_are_told(terms: Terms) -> None:
    with pytest.raises(InfeasibleError):
        promised_node_s([_request(0.0, 1.0)] * 2, terms, nodes=2, hold_s=10.0)


def test_an_end_must_be_named() -> None:
    with pytest.raises(ValueError, match="makespan_s must be finite"):
        promised_node_s([_request(0.0, 1.0)], Terms(1.0, 0, math.inf), nodes=2, hold_s=10.0)


def test_a_program_has_the_cost_of_its_best_solution(capfd: pytest.CaptureFixture[str]) -> None:
    """3x + y with 2x + y >= 3 and y <= 1/2: x = 5/4 and y = 1/2, or x = 2 as a whole number and y = 0."""
    for integer, cost in ((False, 4.25), (True, 6.0)):
        program = Program()
        x = program.variables(1, cost=3.0, integer=integer)
        y = program.variables(1, cost=1.0, upper=0.5)
        row = program.rows(1, least=3.0)
        program.add(row, x, 2.0)
        program.add(row, y, np.array([1.0]))
        assert program.least_cost(gap=0.0, max_nodes=100) == pytest.approx(cost)
    assert capfd.readouterr().out == ""
