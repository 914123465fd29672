"""The simulated cluster: what ends, when, and that the same input gives the same run."""

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.latency import LatencyModel, NodeLatency, OpKind
from services.node_agent.core.types import NodeCoreConfig
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.policies import POLICIES
from services.simulator.cluster import Simulation
from services.simulator.metrics import held_node_s, measure
from services.simulator.types import Microbatch, Request, SimulationConfig, SimulationResult, VirtualNode, Work


def _latency(stages: int, **seconds: float) -> NodeLatency:
    models = {OpKind(kind): LatencyModel("constant", (value,)) for kind, value in seconds.items()}
    return NodeLatency((models,) * stages)


_LATENCY = _latency(2, prefill=1.0, decode=0.1, train_forward=1.0, train_backward=2.0, optimizer_step=0.5)


def _nodes(count: int, latency: NodeLatency = _LATENCY, **lives: tuple[float, float]) -> list[VirtualNode]:
    core = NodeCoreConfig(num_stages=latency.num_stages, max_batch=2)
    return [
        VirtualNode(
            node_id=f"node-{index}",
            latency=latency,
            core=core,
            joins_s=lives.get(f"node_{index}", (0.0, math.inf))[0],
            lost_s=lives.get(f"node_{index}", (0.0, math.inf))[1],
        )
        for index in range(count)
    ]


def _run(nodes: list[VirtualNode], work: list[Work], **config: float) -> SimulationResult:
    core = CoreConfig(policy=str(config.pop("policy", "lemix")))
    return Simulation(SimulationConfig(core=core, keep_ops=True, **config), nodes, work).run()  # type: ignore[arg-type]


def test_a_request_alone_takes_its_prefill_and_its_iterations_on_every_stage() -> None:
    result = _run(_nodes(1), [Request("r", 3.0, 100, 4, 16)])
    record = result.tasks["r"]
    assert record.first_token_s == pytest.approx(5.0)
    assert record.ended_s == pytest.approx(5.0 + 3 * 0.2)
    assert record.outcome == "stop"


def test_a_microbatch_goes_forward_back_and_steps() -> None:
    result = _run(_nodes(1), [Microbatch("m", 0.0, "job", 1, 100)])
    assert result.tasks["m"].ended_s == pytest.approx(1 + 1 + 2 + 2 + 0.5 + 0.5)
    assert result.tasks["m"].outcome == "trained"
    assert result.num_ops == 6


def test_dispatch_and_report_delays_count() -> None:
    result = _run(_nodes(1), [Request("r", 0.0, 100, 1, 1)], dispatch_s=0.25, report_s=0.5)
    assert result.tasks["r"].ended_s == pytest.approx(2.25)


def test_the_end_of_a_task_is_told_before_its_time_with_what_ran_until_then() -> None:
    told: list[tuple[float, str]] = []
    config = SimulationConfig(core=CoreConfig(), report_s=0.5, outcome_s=0.25)
    work = [Request("r", 0.0, 100, 1, 1), Request("s", 4.0, 100, 1, 1)]
    result = Simulation(
        config, _nodes(1), work, on_step=lambda now_s, event, _: told.append((now_s, type(event).__name__))
    ).run()
    reports = [(at_s, name) for at_s, name in told if name in ("OpFinished", "TaskEnded")]
    # A prefill is over on the first stage after 1 s and on the second one after 2 s.
    first = [(1.5, "OpFinished"), (2.25, "OpFinished"), (2.25, "TaskEnded")]
    assert reports == first + [(4.0 + at_s, name) for at_s, name in first]
    assert result.tasks["s"].ended_s == 6.0


def test_work_of_a_lost_node_moves_to_another() -> None:
    nodes = _nodes(2, node_0=(0.0, 1.5))
    work: list[Work] = [Request("r0", 0.0, 100, 1, 1), Microbatch("m0", 0.1, "job", 1, 100)]
    result = _run(nodes, work)
    assert all(record.ok for record in result.tasks.values())
    assert {record.node_id for record in result.tasks.values()} == {"node-1"}
    assert max(record.assignments for record in result.tasks.values()) == 2


@pytest.mark.parametrize("task", [Request("r", 0.0, 100, 1, 1), Microbatch("m", 0.0, "job", 1, 100)])
def test_a_task_that_ended_before_its_node_was_lost_does_not_run_again(task: Work) -> None:
    ended_s = _run(_nodes(1), [task]).tasks[task.task_id].ended_s
    assert ended_s is not None
    result = _run(_nodes(2, node_0=(0.0, ended_s + 0.05)), [task], report_s=0.1)
    assert result.tasks[task.task_id].assignments == 1
    assert result.tasks[task.task_id].ended_s == ended_s


def test_training_on_its_way_to_a_lost_node_is_not_lost() -> None:
    nodes = _nodes(9, **{f"node_{index}": (0.0, 2.5) for index in range(8)})
    work: list[Work] = [Microbatch(f"m{index}", 0.0, "job", 1, 100) for index in range(100)]
    core = CoreConfig(max_waiting_training=8, max_inflight_training=8, policy="round_robin")
    result = Simulation(SimulationConfig(core=core, dispatch_s=1.0), nodes, work).run()
    assert {record.outcome for record in result.tasks.values()} == {"trained"}


def test_many_places_that_become_free_at_once_are_filled() -> None:
    work: list[Work] = [Microbatch(f"m{index}", 0.0, "job", 1, 100) for index in range(3000)]
    core = CoreConfig(max_inflight_training=2000, policy="round_robin")
    nodes = _nodes(1, node_0=(1.0, math.inf))
    result = Simulation(SimulationConfig(core=core, horizon_s=2.0), nodes, work).run()
    assert sum(record.assignments for record in result.tasks.values()) == 2000


def test_a_lost_node_counts_as_held_until_it_was_lost() -> None:
    result = _run(_nodes(2, node_0=(0.0, 1.5)), [Request("r", 0.0, 100, 1, 1)])
    # node-0: 0-1.5, node-1: 1.5-3.5, each prolonged by 10 s.
    assert held_node_s(result, 10.0) == pytest.approx(1.5 + 2.0 + 20.0)


def test_two_lives_of_a_node_may_not_overlap() -> None:
    first, second = _nodes(1, node_0=(0.0, 5.0))[0], _nodes(1, node_0=(4.0, math.inf))[0]
    with pytest.raises(ValueError, match="node-0 joins at 4"):
        _run([first, second], [])


def test_work_waits_for_the_first_node() -> None:
    result = _run(_nodes(1, node_0=(5.0, math.inf)), [Request("r", 0.0, 100, 1, 1)])
    assert result.tasks["r"].ended_s == pytest.approx(7.0)


def test_the_horizon_leaves_work_unfinished() -> None:
    result = _run(_nodes(1), [Request("r", 0.0, 100, 1, 1)], horizon_s=1.5)
    assert result.tasks["r"].outcome == ""
    assert result.ended_s == 1.5
    assert measure(result, slo_s=10.0, hold_s=0.0).slo_attainment == 0.0


def test_a_request_that_fits_nowhere_is_rejected() -> None:
    node = _nodes(1)[0]
    small = VirtualNode(node_id="n", latency=node.latency, core=node.core, max_context_tokens=50)
    assert _run([small], [Request("r", 0.0, 100, 1, 1)]).tasks["r"].outcome == "rejected"


def test_a_node_must_join_before_it_is_lost() -> None:
    with pytest.raises(ValueError, match="node-0 is lost at 1"):
        _run(_nodes(1, node_0=(2.0, 1.0)), [])


def test_held_time_is_the_union_of_stays_with_their_hold() -> None:
    work: list[Work] = [Request("a", 0.0, 100, 1, 1), Request("b", 5.0, 100, 1, 1), Request("c", 100.0, 100, 1, 1)]
    result = _run(_nodes(1), work)
    # a: 0-2, b: 5-7, c: 100-102, each prolonged by 10 s: 0-17 and 100-112.
    assert held_node_s(result, 10.0) == pytest.approx(29.0)
    metrics = measure(result, slo_s=2.0, hold_s=10.0)
    assert metrics.tasks_per_held_node_s == pytest.approx(3 / 29.0)
    assert metrics.slo_attainment == 1.0
    assert metrics.tasks_per_node_s == pytest.approx(3 / 102.0)


def _mixed(seed: int, count: int) -> list[Work]:
    random = Random(seed)
    work: list[Work] = []
    time_s = 0.0
    for index in range(count):
        time_s += random.expovariate(1.0)
        if random.random() < 0.4:
            work.append(Microbatch(f"m{index}", time_s, f"job{index % 2}", 1, 100, accumulation=1 + index % 2))
        else:
            output = random.randint(1, 8)
            work.append(Request(f"r{index}", time_s, random.randint(1, 300), output, output + 4))
    return work


@pytest.mark.parametrize("policy", sorted(POLICIES))
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), noise=st.sampled_from([0.0, 0.3]))
def test_everything_ends_once_and_the_same_input_gives_the_same_run(policy: str, seed: int, noise: float) -> None:
    nodes = _nodes(3, node_1=(0.0, 11.0), node_2=(4.0, math.inf))
    one, two = (_run(nodes, _mixed(seed, 30), policy=policy, noise=noise, seed=seed) for _ in range(2))  # type: ignore[arg-type]
    assert all(record.ok for record in one.tasks.values())
    assert one.ops == two.ops
    assert [(d.at_s, d.task_id, d.node_id) for d in one.decisions] == [
        (d.at_s, d.task_id, d.node_id) for d in two.decisions
    ]


def test_a_stage_runs_one_op_at_a_time() -> None:
    result = _run(_nodes(2), _mixed(3, 60))
    free_from: dict[tuple[str, int], float] = {}
    for op in sorted(result.ops, key=lambda op: op.begin_s):
        key = (op.node_id, op.stage)
        assert op.begin_s >= free_from.get(key, 0.0) - 1e-9
        free_from[key] = op.end_s


def test_one_training_stream_sends_the_next_microbatch_when_the_first_stage_is_free() -> None:
    work: list[Work] = [Microbatch(f"m{index}", 0.0, "job", 1, 100) for index in range(6)]
    core = CoreConfig(policy="separate", policy_options={"one_stream": True})
    result = Simulation(SimulationConfig(core=core, keep_ops=True), _nodes(4), work).run()
    assert all(record.ok for record in result.tasks.values())
    ends = sorted(op.end_s for op in result.ops if op.kind is OpKind.TRAIN_FORWARD and op.stage == 0)
    assert [d.at_s for d in result.decisions[1:]] == ends[:-1]
    assert [d.node_id for d in result.decisions] == ["node-2", "node-3"] * 3
