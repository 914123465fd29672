"""What a node reports about its operations comes out of the status as errors of predictions and as an alarm."""

import time

from lemix.internal.v1 import profile_pb2
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.v1 import cluster_service_pb2
from tests.integration.scheduler.cluster import Cluster, eventually
from tests.integration.scheduler.fakes import FakeGateway, FakeNode

#: Of the profile of these tests, for prompts of three tokens: 1 ms + 3 * 10 us.
PREFILL_S = 1.03e-3


async def _status(gateway: FakeGateway) -> cluster_service_pb2.GetStatusResponse:
    return (await gateway.stub.GetClusterState(pb.GetClusterStateRequest())).status


async def _report(node: FakeNode, task_id: str, duration_s: float, num_ops: int = 1) -> None:
    begin_s = time.monotonic()
    ops = [
        pb.OpTrace(
            stage=0,
            op=profile_pb2.OP_KIND_PREFILL,
            begin_monotonic_s=begin_s,
            duration_s=duration_s,
            task_ids=[task_id],
            num_tokens=3,
            first_token=True,
        )
        for _ in range(num_ops)
    ]
    await node.send(pb.NodeSessionRequest(traces=pb.TraceBatch(ops=ops)))


async def test_traces_become_errors_of_operations_and_of_requests(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler(core={"policy": "lemix"})
    node, gateway = await cluster.node(scheduler), await cluster.gateway(scheduler)
    await gateway.submit("r")
    delivery = await node.take()
    await _report(node, "r", 2.0 * PREFILL_S)
    assert await node.finish(delivery, tokens=(7,))
    await gateway.news("r", "finished")

    async def is_told() -> bool:
        return bool((await _status(gateway)).predictions)

    await eventually(is_told)
    status = await _status(gateway)
    (op,) = status.nodes[0].ops
    assert (op.stage, op.op, op.count, op.drifting) == (0, "prefill", 1, False)
    assert abs(op.error - 0.5) < 1e-6, "half of what it took was predicted"
    assert not op.HasField("error_beside")
    assert {(item.predicted, item.beside_training, item.count) for item in status.predictions} == {
        ("ttft", False, 1),
        ("response", False, 1),
    }


async def test_a_node_that_is_slower_than_its_profile_drifts(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler(core={"policy": "lemix"})
    node, gateway = await cluster.node(scheduler), await cluster.gateway(scheduler)
    await _report(node, "unknown", 1.5 * PREFILL_S, num_ops=60)

    async def is_drifting() -> bool:
        ops = (await _status(gateway)).nodes[0].ops
        return bool(ops) and ops[0].count == 60 and ops[0].drifting

    await eventually(is_drifting)
    (op,) = (await _status(gateway)).nodes[0].ops
    assert 1.4 < op.ratio < 1.6
