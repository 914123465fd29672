"""How long operations take on a virtual node: links, mixed operations, neighbours, noise."""

import math
from random import Random

import pytest

from services.latency import HostLink, Interference, LatencyModel, MixedCost, NodeLatency, OpKind
from services.node_agent.core.types import NodeCoreConfig, Op, QueueOrder
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.tasks import SloTarget
from services.simulator.node import SimNode
from services.simulator.types import SimulationConfig, VirtualNode

STAGES = 3
MODELS = {
    OpKind.PREFILL: LatencyModel("affine", (1.0, 0.01), residual_p5=-0.2, residual_p95=0.2),
    OpKind.DECODE: LatencyModel("constant", (0.5,)),
    OpKind.TRAIN_BACKWARD: LatencyModel("constant", (4.0,), residual_p5=-9.0, residual_p95=9.0),
}
PREFILL = Op(1, OpKind.PREFILL, ("a",), 0, num_tokens=100, batch=1)
DECODE = Op(2, OpKind.DECODE, ("b",), 0, context_tokens=10, batch=1)
BACKWARD = Op(3, OpKind.TRAIN_BACKWARD, ("c",), 0, num_tokens=10, batch=1)


def node(noise=0.0, link=math.inf, **told) -> SimNode:
    latency = NodeLatency((MODELS,) * STAGES, **told)
    spec = VirtualNode(node_id="n", latency=latency, core=NodeCoreConfig(num_stages=STAGES), host_link_bytes_per_s=link)
    config = SimulationConfig(core=CoreConfig(), noise=noise)
    return SimNode(spec, QueueOrder.INFERENCE_FIRST, config, Random(1))


def test_what_the_cluster_promises_by_default_orders_the_queues():
    spec = VirtualNode(node_id="n", latency=NodeLatency((MODELS,)), core=NodeCoreConfig(num_stages=1))
    config = SimulationConfig(core=CoreConfig(default_slo=SloTarget(tpot_s=0.02)))
    made = SimNode(spec, QueueOrder.FIFO, config, Random(1)).core.config
    assert (made.queue_order, made.default_ttft_s, made.default_tpot_s) == (QueueOrder.FIFO, 1.0, 0.02)


def test_neighbours_slow_an_operation_down_by_their_part():
    slow = node(interference=(Interference(1, OpKind.PREFILL, OpKind.TRAIN_BACKWARD, 0.5),))
    assert slow.begin(1, PREFILL) == pytest.approx(2.0)
    slow.end(1)
    assert slow.begin(0, BACKWARD) == pytest.approx(4.0)
    assert slow.begin(1, PREFILL) == pytest.approx(2.0 * 1.25)  # one of two neighbours
    slow.end(1)
    slow.begin(2, BACKWARD)
    assert slow.begin(1, PREFILL) == pytest.approx(2.0 * 1.5)
    slow.end(1)
    slow.end(0)
    slow.end(2)
    assert slow.begin(1, PREFILL) == pytest.approx(2.0)


def test_what_was_not_measured_beside_each_other_does_not_slow_down():
    plain = node(interference=(Interference(0, OpKind.PREFILL, OpKind.DECODE, 9.0),))
    plain.begin(0, BACKWARD)
    assert plain.begin(1, DECODE) == pytest.approx(0.5)


def test_a_mixed_operation_takes_what_was_measured_or_the_sum():
    mixed = PREFILL._replace(task_ids=("a", "b"), decodes=1, decode_context_tokens=10)
    assert node().begin(0, mixed) == pytest.approx(2.5)
    assert node(mixed=(MixedCost(1.0, 1.0, 0.5),) * STAGES).begin(0, mixed) == pytest.approx(2.25)


def test_a_move_takes_the_link_of_the_profile_unless_another_is_named():
    move = Op(4, OpKind.RELOAD, ("a",), 0, num_bytes=100)
    links = (HostLink(10.0, 20.0, 1.0),) * STAGES
    assert node().begin(0, move) == 0.0
    assert node(host_links=links).begin(0, move) == pytest.approx(6.0)
    assert node(link=50.0, host_links=links).begin(0, move) == pytest.approx(2.0)


def _drawn(op, noise):
    noisy, durations = node(noise=noise), []
    for _ in range(2000):
        durations.append(noisy.begin(0, op))
        noisy.end(0)
    mean = sum(durations) / len(durations)
    return math.sqrt(sum((value - mean) ** 2 for value in durations) / len(durations)) / mean


def test_operations_vary_as_asked_or_each_as_its_model_says():
    assert _drawn(PREFILL, 0.05) == pytest.approx(0.05, rel=0.1)
    assert _drawn(DECODE, 0.05) == pytest.approx(0.05, rel=0.1)
    assert _drawn(PREFILL, None) == pytest.approx(0.4 / 3.29, rel=0.1)
    assert _drawn(DECODE, None) == 0.0
    assert _drawn(BACKWARD, None) <= 0.5


def test_negative_noise_is_refused():
    with pytest.raises(ValueError, match="noise must not be negative"):
        SimulationConfig(core=CoreConfig(), noise=-0.1)
