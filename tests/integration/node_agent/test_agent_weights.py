"""Synchronisation of weights between two agents."""

import contextlib
from pathlib import Path

import numpy as np
import pytest

from lemix.internal.v1 import node_agent_service_pb2 as node_pb2
from lemix.internal.v1 import scheduler_service_pb2 as scheduler_pb2
from lemix.v1 import errors_pb2
from services.node_agent.engine.base import StageResult
from services.node_agent.engine.ops import StageOp
from services.node_agent.engine.weight_ops import LoadWeights
from services.node_agent.loop_ports import NodeBroken
from tests.integration.node_agent.harness import Cluster, Node, cluster, inference_item, training_item


async def _train(made: Cluster, node_id: str, job_id: str, learning_rate: float, steps: int = 1) -> None:
    for sequence in range(steps):
        await made.assign(training_item(job_id, sequence, [[1, 2]], learning_rate=learning_rate), node_id)
        await made.scheduler.outcome(f"{job_id}/{sequence}")


async def _snapshot(made: Cluster, sync_id: str, *node_ids: str) -> None:
    before = len(made.scheduler.syncs)
    for node_id in node_ids:
        made.scheduler.command(node_id, take_snapshot=scheduler_pb2.TakeSnapshot(sync_id=sync_id))
    for finished in (await made.scheduler.sync_finished(before + len(node_ids)))[before:]:
        assert finished.snapshot_only
        assert not finished.HasField("error"), finished.error


async def _apply(
    made: Cluster, sync_id: str, mode: scheduler_pb2.SyncMode, node: str, *sources: Node
) -> scheduler_pb2.SyncFinished:
    before = len(made.scheduler.syncs)
    addresses = [source.agent.address for source in sources]
    command = scheduler_pb2.ApplyWeights(sync_id=sync_id, mode=mode, source_addresses=addresses)
    made.scheduler.command(node, apply_weights=command)
    finished = (await made.scheduler.sync_finished(before + 1))[before]
    assert finished.sync_id == sync_id
    assert not finished.snapshot_only
    return finished


def _weights(node: Node) -> list[float]:
    return [worker.stage.weight for worker in node.engine.workers]


async def test_average_keeps_the_steps_made_meanwhile(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        one = await made.start_node("node-0")
        two = await made.start_node("node-1")
        await _train(made, "node-0", "a", 5e-3)  # 4 -> 2
        await _train(made, "node-1", "b", 2.5e-3)  # 4 -> 3
        await _snapshot(made, "s1", "node-0", "node-1")
        await _train(made, "node-0", "a2", 5e-3)  # 2 -> 1, after the snapshot
        assert (await _apply(made, "s1", scheduler_pb2.SYNC_MODE_AVERAGE, "node-0", two)).weight_step == 3
        assert (await _apply(made, "s1", scheduler_pb2.SYNC_MODE_AVERAGE, "node-1", one)).weight_step == 2
        assert _weights(one) == pytest.approx([1 + (2.5 - 2)] * 2)
        assert _weights(two) == pytest.approx([2.5] * 2)
        assert {trace.op for trace in made.scheduler.traces} >= {scheduler_pb2.OpTrace(op="OP_KIND_WEIGHT_SYNC").op}


async def test_replace_takes_the_weights_and_their_age(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        one = await made.start_node("node-0", num_stages=2)
        two = await made.start_node("node-1", num_stages=2)
        await _train(made, "node-0", "a", 5e-3)
        await _snapshot(made, "s1", "node-0")
        assert (await _apply(made, "s1", scheduler_pb2.SYNC_MODE_REPLACE, "node-1", one)).weight_step == 1
        assert _weights(two) == _weights(one) == [2.0, 2.0]
        await made.assign(inference_item("r1", [1], 1), "node-1")
        report = (await made.scheduler.outcome("r1")).inference.report
        assert [version.step for version in report.weight_versions] == [1]
        assert report.HasField("staleness_s"), "trained elsewhere"
        # Untrained weights again: nothing is known about the age of what was replaced.
        three = await made.start_node("node-2", num_stages=2)
        await _snapshot(made, "s2", "node-2")
        await _apply(made, "s2", scheduler_pb2.SYNC_MODE_REPLACE, "node-1", three)
        await made.assign(inference_item("r2", [1], 1), "node-1")
        assert not (await made.scheduler.outcome("r2")).inference.report.HasField("staleness_s")


async def test_an_average_is_as_new_as_its_newest_part(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        trained = await made.start_node("node-0")
        await made.start_node("node-1")
        await _train(made, "node-0", "a", 5e-3)
        await _snapshot(made, "s1", "node-0", "node-1")
        await _apply(made, "s1", scheduler_pb2.SYNC_MODE_AVERAGE, "node-1", trained)
        await made.assign(inference_item("r1", [1], 1), "node-1")
        assert 0 <= (await made.scheduler.outcome("r1")).inference.report.staleness_s < 30
        assert (await made.scheduler.outcome("r1")).inference.report.HasField("staleness_s")


async def test_failures_leave_the_weights_alone(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        one = await made.start_node("node-0")
        other_shape = await made.start_node("node-1", num_stages=1)
        await _snapshot(made, "s1", "node-0", "node-1")
        cases = [
            ("unknown", scheduler_pb2.SYNC_MODE_REPLACE, errors_pb2.ERROR_CODE_NOT_FOUND),
            ("s1", scheduler_pb2.SYNC_MODE_UNSPECIFIED, errors_pb2.ERROR_CODE_INVALID_REQUEST),
            ("s1", scheduler_pb2.SYNC_MODE_AVERAGE, errors_pb2.ERROR_CODE_INTERNAL),
        ]
        for sync_id, mode, code in cases:
            finished = await _apply(made, sync_id, mode, "node-0", other_shape)
            assert finished.error.code == code, finished.error.message
            assert finished.weight_step == 0
        assert _weights(one) == [4.0, 4.0]
        await made.assign(inference_item("r1", [1], 2), "node-0")
        assert not (await made.scheduler.outcome("r1")).inference.HasField("error"), "the node goes on"


async def test_a_peer_that_is_away_is_reported_within_the_deadline(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        node = await made.start_node("node-0", sync_timeout_s=5.0)
        await _snapshot(made, "s1", "node-0")
        before = len(made.scheduler.syncs)
        command = scheduler_pb2.ApplyWeights(
            sync_id="s1", mode=scheduler_pb2.SYNC_MODE_AVERAGE, source_addresses=["127.0.0.1:1"]
        )
        made.scheduler.command("node-0", apply_weights=command)
        finished = (await made.scheduler.sync_finished(before + 1))[before]
        assert finished.error.code in (errors_pb2.ERROR_CODE_UNAVAILABLE, errors_pb2.ERROR_CODE_DEADLINE_EXCEEDED)
        assert _weights(node) == [4.0, 4.0]


async def test_a_peer_lost_between_the_phases_leaves_the_others_whole_and_later_rounds_work(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made, contextlib.AsyncExitStack() as leaving:
        one = await made.start_node("node-0", sync_timeout_s=5.0)
        two = await made.start_node("node-1", sync_timeout_s=5.0)
        three = await made.start_node("node-2", stack=leaving)
        await _train(made, "node-0", "a", 5e-3)  # 4 -> 2
        await _snapshot(made, "s1", "node-0", "node-1", "node-2")
        await leaving.aclose()
        for node_id, peer in (("node-0", two), ("node-1", one)):
            finished = await _apply(made, "s1", scheduler_pb2.SYNC_MODE_AVERAGE, node_id, peer, three)
            assert finished.error.code in (errors_pb2.ERROR_CODE_UNAVAILABLE, errors_pb2.ERROR_CODE_DEADLINE_EXCEEDED)
        assert (_weights(one), _weights(two)) == ([2.0, 2.0], [4.0, 4.0])
        await _snapshot(made, "s2", "node-0", "node-1")
        for node_id, peer in (("node-0", two), ("node-1", one)):
            assert not (await _apply(made, "s2", scheduler_pb2.SYNC_MODE_AVERAGE, node_id, peer)).HasField("error")
        assert _weights(one) == _weights(two) == [3.0, 3.0]


async def test_weights_of_some_stages_only_break_the_node(tmp_path: Path) -> None:
    def tamper(stage: int, op: StageOp, result: StageResult) -> StageResult:
        if isinstance(op, LoadWeights) and stage == 1:
            return StageResult(op.op_id, result.begin_s, result.end_s, result.version, error="OSError: disk gone")
        return result

    async with cluster(tmp_path) as made:
        source = await made.start_node("node-0")
        broken = await made.start_node("node-1", tamper=tamper)
        await _snapshot(made, "s1", "node-0")
        command = scheduler_pb2.ApplyWeights(
            sync_id="s1", mode=scheduler_pb2.SYNC_MODE_REPLACE, source_addresses=[source.agent.address]
        )
        made.scheduler.command("node-1", apply_weights=command)
        with pytest.raises(NodeBroken, match="some stages only: OSError: disk gone"):
            await broken.agent.broken


async def test_snapshots_are_streamed_in_named_chunks(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        node = await made.start_node("node-0")
        await _train(made, "node-0", "a", 5e-3)
        for sync_id in ("s1", "s2", "s3"):
            await _snapshot(made, sync_id, "node-0")
        chunks = [chunk async for chunk in node.stub.FetchWeights(node_pb2.FetchWeightsRequest(sync_id="s3"))]
        assert [(chunk.name, list(chunk.shape), chunk.dtype) for chunk in chunks] == [
            ("layers.0.weight", [4], "F32"),
            ("layers.1.weight", [4], "F32"),
        ]
        assert np.frombuffer(chunks[0].data, "<f4").tolist() == [2.0] * 4
        assert chunks[0].HasField("trained_unix_s")
        with pytest.raises(Exception, match="no snapshot for synchronisation s1"):
            _ = [chunk async for chunk in node.stub.FetchWeights(node_pb2.FetchWeightsRequest(sync_id="s1"))]


async def test_an_adapter_comes_to_a_node_that_lacks_it(tmp_path: Path) -> None:
    """Alone: the weights below it are not asked for. From then on the node serves it."""
    async with cluster(tmp_path) as made:
        one = await made.start_node("node-0")
        two = await made.start_node("node-1")
        item = training_item("job-1", 0, [[1, 2]])
        item.training.lora.rank, item.training.lora.alpha, item.training.isolated = 4, 8.0, True
        await made.assign(item, "node-0")
        await made.scheduler.outcome("job-1/0")
        (held,) = one.agent._description.held_adapters()
        assert (held.adapter_id, held.lora.rank, held.isolated) == ("job-1", 4, True)
        assert not one.agent._loop.adapters.weights_changed
        refused = inference_item("early", [1], 1, adapter_id="job-1")
        await made.assign(refused, "node-1")
        assert (await made.scheduler.outcome("early")).inference.error.code == errors_pb2.ERROR_CODE_MODEL_NOT_FOUND

        taken = scheduler_pb2.TakeSnapshot(sync_id="s", skip_weights=True, adapters=[held])
        made.scheduler.command("node-0", take_snapshot=taken)
        assert not (await made.scheduler.sync_finished(1))[0].HasField("error")
        apply = scheduler_pb2.ApplyWeights(sync_id="s", mode=scheduler_pb2.SYNC_MODE_AVERAGE, skip_weights=True)
        replace = scheduler_pb2.SYNC_MODE_REPLACE
        apply.adapters.add(adapter=held, mode=replace, source_addresses=[one.agent.address])
        made.scheduler.command("node-1", apply_weights=apply)
        assert not (await made.scheduler.sync_finished(2))[1].HasField("error")
        assert two.agent._description.held_adapters() == (held,)
        assert not two.agent._loop.adapters.weights_changed
        await made.assign(inference_item("late", [1], 1, adapter_id="job-1"), "node-1")
        report = (await made.scheduler.outcome("late")).inference.report
        assert [version.job_id for version in report.weight_versions] == ["job-1"]
        assert report.HasField("staleness_s"), "trained elsewhere"

        made.scheduler.command("node-1", forget_adapter=scheduler_pb2.ForgetAdapter(adapter_id="job-1"))
        await made.assign(inference_item("meanwhile", [1], 400, adapter_id="job-1"), "node-1")
        ended = (await made.scheduler.outcome("meanwhile")).inference.error.code
        assert ended in (errors_pb2.ERROR_CODE_MODEL_NOT_FOUND, errors_pb2.ERROR_CODE_CANCELLED)
        await made.assign(inference_item("later", [1], 1, adapter_id="job-1"), "node-1")
        assert (await made.scheduler.outcome("later")).inference.error.code == errors_pb2.ERROR_CODE_MODEL_NOT_FOUND
        assert two.agent._description.held_adapters() == ()
