"""Synchronous training and memory limits in the simulated cluster."""

import math

import pytest

from services.latency import MOVES, LatencyModel, NodeLatency, OpKind
from services.node_agent.core.types import SCHEDULES, MemoryConfig, NodeCoreConfig
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.policies import POLICIES
from services.simulator.cluster import Simulation
from services.simulator.types import Microbatch, Request, SimulationConfig, SimulationResult, VirtualNode, Work

STAGES, M = 3, 4
_LINKS = (math.inf, 1e5, 1e4, 1e3)
_SECONDS = {"prefill": 1.0, "decode": 0.1, "train_forward": 1.0, "train_backward": 1.0, "optimizer_step": 0.0}
_LATENCY = NodeLatency(
    ({OpKind(kind): LatencyModel("constant", (value,)) for kind, value in _SECONDS.items()},) * STAGES
)
#: Every task of `_work` holds 1000 bytes on a stage.
_MEMORY = MemoryConfig(
    peak_bytes=2500,
    kv_bytes_per_token=10,
    activation_bytes_per_token=10,
    kappa=1.0,
    max_wait_s=0.25,
    max_forward_wait_s=0.25,
)


def _run(
    work: list[Work], *, link: float = math.inf, policy: str = "lemix", nodes: int = 1, **core: object
) -> SimulationResult:
    given = {"num_stages": STAGES, "max_batch": 2, **core}
    virtual = [
        VirtualNode(
            node_id=f"n{index}",
            latency=_LATENCY,
            core=NodeCoreConfig(**given),  # type: ignore[arg-type]
            host_link_bytes_per_s=link,
        )
        for index in range(nodes)
    ]
    return Simulation(SimulationConfig(core=CoreConfig(policy=policy), keep_ops=True), virtual, work).run()


def _microbatches(count: int) -> list[Work]:
    return [Microbatch(f"m{index}", 0.0, "job", 1, 100, M) for index in range(count)]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_mini_batches_follow_one_another_with_the_textbook_bubble(schedule: str) -> None:
    """The next group leaves when the step has ended, so bubbles add up."""
    result = _run(_microbatches(3 * M), training_schedule=schedule)
    assert {record.outcome for record in result.tasks.values()} == {"trained"}
    assert result.ended_s == pytest.approx(3 * 2 * (M + STAGES - 1))


def test_asynchronous_training_has_the_bubble_once() -> None:
    result = _run(_microbatches(3 * M), weight_handling="stash", gradient_buffers=STAGES, max_inflight_training=8)
    assert result.ended_s < 3 * 2 * (M + STAGES - 1)


def test_1f1b_needs_less_memory_than_gpipe() -> None:
    """GPipe keeps the activations of the whole mini-batch, 1F1B on a stage those of at most the stages above and it."""
    memory = MemoryConfig(peak_bytes=3000, kv_bytes_per_token=10, activation_bytes_per_token=10, kappa=1.0)
    runs = {
        schedule: _run(_microbatches(2 * M), link=1e4, training_schedule=schedule, memory=memory)
        for schedule in ("gpipe", "1f1b")
    }
    assert runs["1f1b"].memory["n0"].offloads == 0
    assert runs["gpipe"].memory["n0"].offloads > 0
    assert runs["gpipe"].ended_s > runs["1f1b"].ended_s


def test_a_move_takes_its_bytes_over_the_bandwidth_of_the_link() -> None:
    result = _run(_microbatches(M), link=2000.0, training_schedule="gpipe", memory=_MEMORY)
    moves = [op for op in result.ops if op.kind in MOVES]
    counters = result.memory["n0"]
    assert moves
    assert sum(op.end_s - op.begin_s for op in moves) == pytest.approx(
        (counters.offloaded_bytes + counters.reloaded_bytes) / 2000.0
    )
    assert (counters.offloads, counters.reloads) == (
        sum(op.kind is OpKind.OFFLOAD for op in moves),
        sum(op.kind is OpKind.RELOAD for op in moves),
    )


def test_a_slower_link_makes_the_same_work_later() -> None:
    ends = [_run(_microbatches(2 * M), link=link, training_schedule="gpipe", memory=_MEMORY).ended_s for link in _LINKS]
    assert ends == sorted(ends)
    assert ends[0] < ends[-1]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_under_memory_pressure_every_task_ends_well_under_every_policy(policy: str, schedule: str) -> None:
    requests: list[Work] = [Request(f"r{index}", index * 0.5, 90, 10, 10) for index in range(12)]
    result = _run(
        [*requests, *_microbatches(2 * M)], link=1e4, policy=policy, nodes=2, memory=_MEMORY, training_schedule=schedule
    )
    assert all(record.ok for record in result.tasks.values())
    assert sum(counters.waits for counters in result.memory.values()) > 0
    assert all(set(counters.used_bytes) == {0} for counters in result.memory.values())


def test_without_wait_or_offload_work_is_lost() -> None:
    memory = MemoryConfig(
        peak_bytes=2500, kv_bytes_per_token=10, activation_bytes_per_token=10, kappa=1.0, wait_or_offload=False
    )
    requests: list[Work] = [Request(f"r{index}", index * 0.5, 90, 10, 10) for index in range(12)]
    result = _run([*requests, *_microbatches(M)], memory=memory)
    failed = [record for record in result.tasks.values() if record.outcome == "error"]
    assert failed
    assert result.memory["n0"].failures > 0
    assert result.memory["n0"].offloads == 0


def test_a_link_without_bandwidth_is_refused() -> None:
    with pytest.raises(ValueError, match="host_link_bytes_per_s"):
        VirtualNode(node_id="n", latency=_LATENCY, core=NodeCoreConfig(num_stages=STAGES), host_link_bytes_per_s=0.0)
