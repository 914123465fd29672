"""Training that comes as a stream, with or without an end."""

import math
from collections.abc import Iterator
from itertools import count, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.latency import LatencyModel, NodeLatency, OpKind
from services.node_agent.core.types import NodeCoreConfig
from services.scheduler.core.config import CoreConfig
from services.simulator.cluster import Simulation
from services.simulator.training_supply import TrainingSupply
from services.simulator.types import Microbatch, Request, SimulationConfig, SimulationResult, VirtualNode, Work

_SECONDS = {"prefill": 1.0, "decode": 0.1, "train_forward": 1.0, "train_backward": 2.0, "optimizer_step": 0.5}
_LATENCY = NodeLatency(({OpKind(kind): LatencyModel("constant", (s,)) for kind, s in _SECONDS.items()},))


def _endless(gap_s: float) -> Iterator[Microbatch]:
    return (Microbatch(f"m{index}", index * gap_s, "job", 1, 100) for index in count())


def _run(
    work: list[Work],
    training: Iterator[Microbatch] | None,
    *,
    nodes: int = 1,
    policy: str = "round_robin",
    horizon_s: float = math.inf,
    max_waiting_training: int = 64,
) -> SimulationResult:
    core = CoreConfig(policy=policy, max_waiting_training=max_waiting_training)
    config = SimulationConfig(core=core, keep_ops=True, horizon_s=horizon_s)
    cluster = [
        VirtualNode(node_id=f"n{index}", latency=_LATENCY, core=NodeCoreConfig(num_stages=1)) for index in range(nodes)
    ]
    return Simulation(config, cluster, work, training).run()


def _trained(result: SimulationResult) -> int:
    return sum(record.ok for record in result.microbatches())


def test_a_backlog_without_end_keeps_a_node_busy_until_the_last_request() -> None:
    result = _run([Request("r", 100.0, 10, 1, 1)], _endless(0.0))
    assert result.tasks["r"].ok
    assert result.ended_s == result.tasks["r"].ended_s
    # A micro-batch takes 3.5 s: what began before the request came is trained, and what is on its way is not.
    assert _trained(result) == pytest.approx(result.ended_s / 3.5, abs=2)


def test_training_alone_runs_to_the_horizon() -> None:
    result = _run([], _endless(0.0), horizon_s=35.5)
    assert result.ended_s == 35.5
    assert _trained(result) == 10


def test_training_alone_needs_a_horizon() -> None:
    with pytest.raises(ValueError, match="set horizon_s"):
        _run([], _endless(0.0))


def test_a_paced_stream_trains_no_faster_than_it_comes() -> None:
    result = _run([], _endless(20.0), horizon_s=100.0)
    begun = [record.assigned_s for record in result.microbatches()]
    assert begun == pytest.approx([0.0, 20.0, 40.0, 60.0, 80.0, 100.0])


def test_a_stream_is_taken_from_only_as_fast_as_there_is_room() -> None:
    taken = []

    def stream() -> Iterator[Microbatch]:
        for microbatch in _endless(0.0):
            taken.append(microbatch.task_id)
            yield microbatch

    result = _run([], stream(), horizon_s=35.5, max_waiting_training=3)
    # 10 trained, 4 with the node, 3 waiting, and the next in hand.
    assert len(taken) <= 10 + 4 + 3 + 1
    assert len(result.tasks) == len(taken) - 1


@given(
    times=st.lists(st.floats(0.01, 60.0), min_size=1, max_size=25, unique=True),
    at_s=st.floats(61.0, 90.0),
    nodes=st.integers(1, 3),
    policy=st.sampled_from(["lemix", "round_robin", "least_loaded", "separate"]),
)
def test_a_stream_runs_as_the_same_micro_batches_given_at_once(
    times: list[float], at_s: float, nodes: int, policy: str
) -> None:
    microbatches = [Microbatch(f"m{i}", time_s, "job", 1, 50) for i, time_s in enumerate(sorted(times))]
    request = Request("r", at_s, 10, 4, 8)
    at_once = _run([*microbatches, request], None, nodes=nodes, policy=policy)
    streamed = _run([request], iter(microbatches), nodes=nodes, policy=policy)
    assert streamed.ops == at_once.ops[: len(streamed.ops)]
    assert streamed.tasks["r"].ended_s == at_once.tasks["r"].ended_s


def test_a_stream_may_not_go_back_in_time() -> None:
    late, early = Microbatch("late", 5.0, "job", 1, 10), Microbatch("early", 4.0, "job", 1, 10)
    with pytest.raises(ValueError, match="task early arrives before"):
        _run([], iter([late, early]), horizon_s=10.0)


def test_a_stream_may_not_repeat_a_task() -> None:
    twice = [Microbatch("m", 0.0, "job", 1, 10)] * 2
    with pytest.raises(ValueError, match="task m is there twice"):
        _run([], iter(twice), horizon_s=10.0)


@given(st.integers(1, 5), st.lists(st.sampled_from(["take", "leave", "refuse"]), max_size=40))
def test_no_more_is_offered_than_there_is_room_for(most: int, steps: list[str]) -> None:
    supply = TrainingSupply(most, _endless(0.0), lambda microbatch: None)
    offered: dict[str, Microbatch] = {}
    for step in steps:
        if step == "take":
            work = supply.take(0.0)
            assert (work is None) == (len(offered) == most)
            if work is not None:
                assert work.task_id not in offered
                offered[work.task_id] = work
        elif offered:
            _, work = offered.popitem()
            supply.left_core(work.task_id) if step == "leave" else supply.refused(work)
    assert len(offered) <= most


def test_what_was_refused_comes_first() -> None:
    supply = TrainingSupply(2, islice(_endless(0.0), 5), lambda microbatch: None)
    first = supply.take(0.0)
    assert first is not None
    supply.refused(first)
    assert supply.take(0.0) is first


def test_nodes_that_are_there_from_the_beginning_share_a_backlog_that_is() -> None:
    result = _run([], _endless(0.0), nodes=2, policy="separate", horizon_s=20.0)
    assert {record.node_id for record in result.microbatches() if record.node_id} == {"n1"}
