"""The clairvoyant bound: nothing that any policy or any schedule reaches lies below it."""

import itertools
import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.latency import LatencyModel, NodeLatency, OpKind
from services.node_agent.core.types import NodeCoreConfig
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.policies import POLICIES
from services.scheduler.core.tasks import SloTarget
from services.simulator.clairvoyant import Demand, clairvoyant_node_s, demands
from services.simulator.cluster import Simulation
from services.simulator.metrics import held_node_s
from services.simulator.types import Microbatch, Request, SimulationConfig, VirtualNode, Work

_FORMS = {
    OpKind.PREFILL: LatencyModel("quadratic", (1e-6,)),
    OpKind.DECODE: LatencyModel("full_decode", (0.002, 0.001, 1e-5)),
    OpKind.TRAIN_FORWARD: LatencyModel("quadratic", (1e-6,)),
    OpKind.TRAIN_BACKWARD: LatencyModel("quadratic", (2e-6,)),
    OpKind.OPTIMIZER_STEP: LatencyModel("constant", (0.01,)),
}


def _nodes(count: int, stages: int = 2, **changes: object) -> list[VirtualNode]:
    core = NodeCoreConfig(num_stages=stages, max_batch=1, max_inflight_training=4, weight_handling="stash")
    slow = {kind: LatencyModel(m.form, tuple(2.0 * c for c in m.coefficients)) for kind, m in _FORMS.items()}
    latencies = (NodeLatency((_FORMS,) * stages), NodeLatency((slow,) * stages))
    return [
        VirtualNode(node_id=f"n{index}", latency=latencies[index % 2], core=core, **changes)  # type: ignore[arg-type]
        for index in range(count)
    ]


def _work(seed: int, count: int, rate: float, share: float) -> list[Work]:
    random = Random(seed)
    work: list[Work] = []
    at_s = 0.0
    for index in range(count):
        at_s += random.expovariate(rate)
        length = random.randint(8, 900)
        if random.random() < share:
            work.append(Microbatch(f"m{index}", at_s, f"job{index % 2}", 1, length, accumulation=1 + index % 3))
        else:
            output = random.randint(1, 5)
            work.append(Request(f"r{index}", at_s, length, output, output + 3, SloTarget(ttft_s=1.0)))
    return work


@pytest.mark.parametrize("policy", sorted(POLICIES))
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 60),
    rate=st.sampled_from([0.02, 0.3, 2.0, 20.0]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    nodes=st.integers(1, 4),
    stages=st.integers(1, 3),
    hold_s=st.sampled_from([0.0, 0.5, 10.0]),
)
def test_no_policy_is_below_the_bound(
    policy: str, seed: int, count: int, rate: float, share: float, nodes: int, stages: int, hold_s: float
) -> None:
    cluster = _nodes(nodes, stages)
    work = _work(seed, count, rate, share)
    core = CoreConfig(policy=policy, max_inflight_training=4)
    result = Simulation(SimulationConfig(core=core), cluster, work).run()
    assert all(record.ok for record in result.tasks.values())
    bound_s = clairvoyant_node_s(demands(work, cluster), hold_s)
    assert held_node_s(result, hold_s) >= bound_s * (1 - 1e-9)


def _held(stays: list[tuple[float, float]], hold_s: float) -> float:
    total_s, until_s = 0.0, -math.inf
    for begin_s, end_s in sorted(stays):
        total_s += max(0.0, end_s + hold_s - max(begin_s, until_s))
        until_s = max(until_s, end_s + hold_s)
    return total_s


def _best_schedule(tasks: list[Demand], hold_s: float) -> float:
    """The best of every split over two nodes and every order on them. One stage; requests are taken when they arrive,
    micro-batches when they begin."""
    best_s = math.inf
    for order in itertools.permutations(range(len(tasks))):
        for split in itertools.product((0, 1), repeat=len(tasks)):
            free_s = [-math.inf, -math.inf]
            stays: list[list[tuple[float, float]]] = [[], []]
            for index in order:
                node = split[index]
                task = tasks[index]
                begin_s = max(free_s[node], task.arrival_s)
                free_s[node] = begin_s + task.stage_s[0]
                stays[node].append((task.arrival_s if task.is_request else begin_s, free_s[node]))
            best_s = min(best_s, sum(_held(node_stays, hold_s) for node_stays in stays))
    return best_s


@settings(deadline=None, max_examples=60)
@given(
    tasks=st.lists(
        st.builds(Demand, st.floats(0, 12), st.tuples(st.floats(0.1, 4)), st.booleans()), min_size=1, max_size=4
    ),
    hold_s=st.sampled_from([0.0, 1.0, 5.0]),
)
def test_no_schedule_of_a_small_instance_is_below_the_bound(tasks: list[Demand], hold_s: float) -> None:
    assert _best_schedule(tasks, hold_s) >= clairvoyant_node_s(tasks, hold_s) * (1 - 1e-9)


@settings(deadline=None, max_examples=60)
@given(
    tasks=st.lists(st.builds(Demand, st.floats(0, 12), st.tuples(st.floats(0.1, 4)), st.just(True)), max_size=4),
    hold_s=st.sampled_from([0.0, 1.0, 5.0]),
)
def test_one_node_in_order_of_arrival_reaches_the_bound(tasks: list[Demand], hold_s: float) -> None:
    """Requests only, each within the hold of one before it: one node is optimal, and the bound is tight."""
    free_s = until_s = -math.inf
    stays = []
    for task in sorted(tasks, key=lambda task: task.arrival_s):
        if stays and task.arrival_s > until_s:
            return
        until_s = max(until_s, task.arrival_s + task.stage_s[0] + hold_s)
        free_s = max(free_s, task.arrival_s) + task.stage_s[0]
        stays.append((task.arrival_s, free_s))
    assert _held(stays, hold_s) == pytest.approx(clairvoyant_node_s(tasks, hold_s))


@pytest.mark.parametrize(
    ("tasks", "bound_s"),
    [
        ([], 0.0),
        ([Demand(5.0, (1.0, 2.0), True)], 3.0 + 10.0),  # alone: both stages, one after the other
        ([Demand(0.0, (1.0, 2.0), True), Demand(100.0, (1.0, 2.0), True)], 2 * 13.0),  # released in between
        ([Demand(0.0, (1.0,), False), Demand(100.0, (1.0,), False)], 2.0 + 10.0),  # the first may wait for the second
        ([Demand(0.0, (1.0, 3.0), False)] * 50, 150.0 + 10.0),  # the fullest stage
        ([Demand(0.0, (1.0,), True), Demand(4.0, (9.0,), True)], 4.0 + 9.0 + 10.0),  # span before, work after
    ],
)
def test_bounds_worked_out_by_hand(tasks: list[Demand], bound_s: float) -> None:
    assert clairvoyant_node_s(tasks, 10.0) == pytest.approx(bound_s)


def test_demands_are_those_of_the_fastest_node() -> None:
    work: list[Work] = [Request("r", 0.0, 100, 3, 8), Microbatch("m", 1.0, "job", 2, 100, accumulation=4)]
    request, microbatch = demands(work, _nodes(2))
    assert request.stage_s == pytest.approx((0.01 + 2 * 0.003 + 1e-5 * (101 + 102),) * 2)
    assert microbatch.stage_s == pytest.approx((0.02 + 0.04 + 0.01 / 4,) * 2)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([], "at least one node"),
        (_nodes(1, joins_s=1.0), "n0 is not there the whole time"),
        (_nodes(1, lost_s=9.0), "n0 is not there the whole time"),
        ([*_nodes(1, stages=1), *_nodes(1, stages=2)], "number of stages"),
        ([VirtualNode(node_id="b", latency=NodeLatency((_FORMS,)), core=NodeCoreConfig(num_stages=1))], "max_batch 16"),
    ],
)
def test_where_the_bound_does_not_hold_it_is_refused(nodes: list[VirtualNode], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demands([], nodes)
