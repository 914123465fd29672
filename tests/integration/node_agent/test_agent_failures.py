"""What the node does when something around it, or in it, fails."""

import contextlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import node_agent_service_pb2 as node_pb2
from lemix.internal.v1 import profile_pb2, work_pb2
from lemix.internal.v1 import scheduler_service_pb2 as scheduler_pb2
from lemix.v1 import errors_pb2, types_pb2
from services.ledger import Delivery, LedgerUnavailable, open_ledger
from services.node_agent.engine.base import StageResult, WorkerDied
from services.node_agent.engine.inference_ops import Decode
from services.node_agent.engine.ops import Measure, StageOp
from services.node_agent.engine.training_ops import OptimizerStep, TrainBackward, TrainForward
from services.node_agent.loop_ports import NodeBroken
from tests.integration.node_agent.harness import Gate, cluster, expected_tokens, inference_item, training_item


async def test_the_node_works_on_while_the_scheduler_is_away(tmp_path: Path) -> None:
    gate = Gate()
    async with cluster(tmp_path) as made:
        await made.start_node(gate=gate)
        gate.close()
        await made.assign(inference_item("r1", [1, 2], 3))
        await gate.until_waiting()
        await made.scheduler.stop()
        gate.open()
        await made.assign(inference_item("r2", [3], 2))
        while (record := await made.ledger.record("r2")) is None or record.outcome is None:
            await made.ledger.read_global(count=1, block_s=0.01)  # passes time until the node has finished
        assert not made.scheduler.outcomes
        await made.scheduler.start()
        assert list((await made.scheduler.outcome("r1")).inference.token_ids) == expected_tokens([1, 2], 3)
        await made.scheduler.outcome("r2")
        assert len(made.scheduler.hellos) == 2
        assert made.scheduler.hellos[0].incarnation == made.scheduler.hellos[1].incarnation


async def test_an_older_scheduler_is_not_followed(tmp_path: Path) -> None:
    async with cluster(tmp_path, fencing_token=5) as made:
        await made.start_node()
        await made.scheduler.stop()
        made.scheduler.welcome.fencing_token = 4
        await made.scheduler.start()
        await made.scheduler.until(lambda: len(made.scheduler.hellos) >= 3, "a second try after the refusal")
        made.scheduler.welcome.fencing_token = 6
        heartbeats = len(made.scheduler.heartbeats)
        await made.scheduler.until(lambda: len(made.scheduler.heartbeats) > heartbeats, "a session again")


async def test_queue_order_follows_the_scheduler(tmp_path: Path) -> None:
    async with cluster(tmp_path, queue_order="fifo") as made:
        node = await made.start_node()
        await made.assign(training_item("job", 0, [[1, 2]]))
        await made.scheduler.outcome("job/0")
        await made.scheduler.stop()
        made.scheduler.welcome.queue_order = "inference_first"
        made.scheduler.welcome.default_slo.tpot_s = 0.03
        await made.scheduler.start()
        await made.scheduler.until(lambda: len(made.scheduler.hellos) == 2, "the node's return")
        await made.assign(training_item("job", 1, [[1, 2]]))
        assert (await made.scheduler.outcome("job/1")).training.weight_step == 2, "the version went on"
        config = node.agent._loop._core.config
        assert (config.queue_order, config.default_ttft_s, config.default_tpot_s) == ("inference_first", 1.0, 0.03)


class _UnsteadyLedger:
    """A ledger that can be away, and that delivers what a test puts into it."""

    def __init__(self, ledger: Any) -> None:
        self._ledger = ledger
        self.away = False
        self.reading_works = False
        self.extra: list[Delivery] = []
        self.refused = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ledger, name)

    def _check(self) -> None:
        if self.away:
            self.refused += 1
            raise LedgerUnavailable("redis://nowhere is away")

    async def read_node(self, node_id: str, *, count: int, block_s: float) -> list[Delivery]:
        if not self.reading_works:
            self._check()
        extra, self.extra = self.extra, []
        return extra or await self._ledger.read_node(node_id, count=count, block_s=block_s)

    async def finish(self, node_id: str, entry_id: str, outcome: work_pb2.WorkOutcome) -> bool:
        self._check()
        return bool(await self._ledger.finish(node_id, entry_id, outcome))


async def test_outcomes_wait_for_the_ledger_and_nothing_new_is_taken(tmp_path: Path) -> None:
    gate = Gate()
    async with cluster(tmp_path) as made:
        ledger = _UnsteadyLedger(await open_ledger(made.ledger_url))
        node = await made.start_node(gate=gate, ledger=ledger, max_inflight_inference=1, max_queued_training=1)
        gate.close()
        await made.assign(inference_item("r1", [1], 1))
        await gate.until_waiting()
        ledger.away = True
        gate.open()
        tokens, outcome = (await node.stream(("r1", 0)))["r1"]
        assert tokens == expected_tokens([1], 1), "the client has its answer"
        assert outcome.finish_reason == types_pb2.FINISH_REASON_LENGTH
        assert "r1" not in made.scheduler.outcomes
        assert node.agent._intake.num_tasks == 1
        ledger.away = False
        await made.scheduler.outcome("r1")
        assert node.agent._intake.num_tasks == 0


async def test_a_stale_delivery_is_refused_unless_the_ledger_says_it_is_ours(tmp_path: Path) -> None:
    async with cluster(tmp_path, fencing_token=9) as made:
        ledger = _UnsteadyLedger(await open_ledger(made.ledger_url))
        stale = inference_item("stale", [1], 1)
        ledger.extra = [Delivery("0-0", stale)]
        node = await made.start_node(ledger=ledger)
        await made.assign(inference_item("ours", [2], 1))  # token 1, older than the welcome's, but on this node
        await made.scheduler.outcome("ours")
        assert "stale" not in made.scheduler.outcomes
        assert await made.ledger.record("stale") is None
        assert node.agent._intake.num_tasks == 0


async def test_an_outcome_of_a_task_taken_away_is_not_reported(tmp_path: Path) -> None:
    gate = Gate()
    async with cluster(tmp_path) as made:
        await made.start_node(gate=gate)
        gate.close()
        await made.assign(inference_item("r1", [1], 1))
        await gate.until_waiting()
        await made.ledger.take_back("node-0", token=made.token)
        gate.open()
        await made.assign(inference_item("r2", [1], 1))
        await made.scheduler.outcome("r2")
        assert "r1" not in made.scheduler.outcomes


def _fail(kind: type, stage: int, **changes: Any) -> Any:
    def tamper(where: int, op: StageOp, result: StageResult) -> StageResult:
        return replace(result, **changes) if isinstance(op, kind) and where == stage else result

    return tamper


@pytest.mark.parametrize(
    ("tamper", "expected"),
    [
        (_fail(TrainForward, 1, loss=math.nan), "loss is nan"),
        (_fail(TrainForward, 0, error="RuntimeError: secret path"), "train_forward failed on stage 0: RuntimeError"),
        (_fail(TrainBackward, 0, error="RuntimeError: boom"), "train_backward failed on stage 0: RuntimeError"),
        (_fail(OptimizerStep, 0, error="ArithmeticError: the norm is inf"), "the norm is inf"),
    ],
)
async def test_training_failures_are_reported_and_the_node_goes_on(tmp_path: Path, tamper: Any, expected: str) -> None:
    async with cluster(tmp_path) as made:
        node = await made.start_node(tamper=tamper)
        await made.assign(training_item("job", 0, [[1, 2]]))
        await made.assign(inference_item("r1", [1], 3))
        outcome = (await made.scheduler.outcome("job/0")).training
        assert outcome.error.code == errors_pb2.ERROR_CODE_INTERNAL
        assert expected in outcome.error.message
        assert "secret" not in outcome.error.message
        assert not outcome.HasField("loss")
        assert outcome.skipped == ("nan" in expected or "inf" in expected)
        assert list((await made.scheduler.outcome("r1")).inference.token_ids) == expected_tokens([1], 3)
        await made.scheduler.until(lambda: not node.held_by_stages(), "freed memory")


async def test_a_step_that_fails_below_is_skipped_above(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        node = await made.start_node(tamper=_fail(OptimizerStep, 0, error="OutOfMemoryError: 1 GiB"))
        await made.assign(training_item("job", 0, [[1, 2]]))
        outcome = (await made.scheduler.outcome("job/0")).training
        assert outcome.error.code == errors_pb2.ERROR_CODE_RESOURCE_EXHAUSTED
        assert node.engine.workers[1].stage.weight == 4.0, "unchanged"
        assert math.isnan(node.engine.workers[1].stage.clip_norms_sq[0] or 0.0)


async def test_a_step_on_some_stages_only_breaks_the_node(tmp_path: Path) -> None:
    """The weights belong to no version then: the work stays in the ledger for a node whose weights do."""
    async with cluster(tmp_path) as made:
        node = await made.start_node(tamper=_fail(OptimizerStep, 1, error="OutOfMemoryError: 1 GiB"))
        await made.assign(training_item("job", 0, [[1, 2]]))
        with pytest.raises(NodeBroken, match="optimizer step 1 changed the weights of some stages only"):
            await node.agent.broken
        assert [item.task_id for item in await made.ledger.unfinished("node-0")] == ["job/0"]


async def test_a_failed_decode_ends_its_requests_with_what_they_have(tmp_path: Path) -> None:
    tamper = _fail(Decode, 1, error="OutOfMemoryError: tried to allocate 3 GiB", tokens=())
    async with cluster(tmp_path) as made:
        node = await made.start_node(tamper=tamper)
        await made.assign(inference_item("r1", [1], 3))
        outcome = (await made.scheduler.outcome("r1")).inference
        assert outcome.finish_reason == types_pb2.FINISH_REASON_ERROR
        assert outcome.error.code == errors_pb2.ERROR_CODE_RESOURCE_EXHAUSTED
        assert "3 GiB" in outcome.error.message
        assert list(outcome.token_ids) == expected_tokens([1], 1)
        await made.scheduler.until(lambda: not node.held_by_stages(), "freed KV caches")


async def test_a_dead_worker_breaks_the_node_and_leaves_its_work(tmp_path: Path) -> None:
    def tamper(stage: int, op: StageOp, result: StageResult) -> StageResult:
        if stage == 1 and isinstance(op, Decode):
            raise WorkerDied("stage 1 ended with exit code -9")
        return result

    async with cluster(tmp_path) as made:
        node = await made.start_node(tamper=tamper)
        await made.assign(inference_item("r1", [1], 3))
        with pytest.raises(NodeBroken, match="exit code -9"):
            await node.agent.broken
        assert [item.task_id for item in await made.ledger.unfinished("node-0")] == ["r1"]


async def test_measuring(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        node = await made.start_node()
        request = node_pb2.MeasureOpsRequest(
            points=[
                node_pb2.GridPoint(op=profile_pb2.OP_KIND_PREFILL, batch=2, length=8),
                node_pb2.GridPoint(op=profile_pb2.OP_KIND_TRAIN_FORWARD, batch=1, length=16),
            ],
            repetitions=3,
            samples=[work_pb2.TrainingExample(token_ids=[1, 2, 3])],
        )
        responses = [response async for response in node.stub.MeasureOps(request)]
        kinds = [[(item.op, item.stage, len(item.durations_s)) for item in r.measurements] for r in responses]
        forward, backward = profile_pb2.OP_KIND_TRAIN_FORWARD, profile_pb2.OP_KIND_TRAIN_BACKWARD
        assert kinds == [
            [(profile_pb2.OP_KIND_PREFILL, 0, 3), (profile_pb2.OP_KIND_PREFILL, 1, 3)],
            [(forward, 0, 3), (backward, 0, 3), (forward, 1, 3), (backward, 1, 3)],
            [],
        ]
        assert list(responses[-1].sample_losses) == pytest.approx([4.0])
        assert list(responses[-1].peak_memory_bytes) == [1 << 20, 2 << 20]
        await made.scheduler.until(lambda: not node.held_by_stages(), "freed activations")
        assert {worker.stage.version for worker in node.engine.workers} == {0}


def _points(**point: Any) -> dict[str, Any]:
    return {"points": [node_pb2.GridPoint(**{"op": profile_pb2.OP_KIND_PREFILL, "batch": 1, "length": 5, **point})]}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"repetitions": 0}, "repetitions"),
        ({"repetitions": 101}, "repetitions"),
        ({"warmup": 11}, "warmup"),
        ({"rounds": 101}, "rounds"),
        ({"budget_s": float("nan")}, "budget_s"),
        ({"budget_s": -1.0}, "budget_s"),
        ({"points": []}, "points"),
        ({"points": [node_pb2.GridPoint(op=profile_pb2.OP_KIND_PREFILL, batch=1, length=5)] * 10_001}, "points"),
        ({"allow_busy": True, "samples": [work_pb2.TrainingExample(token_ids=[1, 2])]}, "samples"),
        (_points(op=profile_pb2.OP_KIND_TRAIN_BACKWARD), "points.0"),
        (_points(op=profile_pb2.OP_KIND_DECODE, batch=0), "points.0"),
        (_points(op=profile_pb2.OP_KIND_DECODE, length=513), "points.0"),
        (_points(length=500, cached_tokens=13), "points.0"),
        (_points(op=profile_pb2.OP_KIND_DECODE, cached_tokens=13), "points.0"),
        (_points(decodes=2), "points.0"),
        (_points(op=profile_pb2.OP_KIND_OFFLOAD), "points.0"),
        (_points(op=profile_pb2.OP_KIND_RELOAD, num_bytes=5), "points.0"),
        (_points(op=77), "points.0"),
        (_points(busy=5), "points.0"),
    ],
)
async def test_bad_measurements_are_refused(tmp_path: Path, changes: dict[str, Any], param: str) -> None:
    async with cluster(tmp_path) as made:
        node = await made.start_node()
        good = {**_points(), "repetitions": 1}
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            _ = [r async for r in node.stub.MeasureOps(node_pb2.MeasureOpsRequest(**{**good, **changes}))]
        error = LemixError.from_rpc(raised.value)
        assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, param)


async def test_points_are_measured_in_rounds_with_all_they_say(tmp_path: Path) -> None:
    train, offload = profile_pb2.OP_KIND_TRAIN_FORWARD, profile_pb2.OP_KIND_OFFLOAD
    prefill = node_pb2.GridPoint(
        op=profile_pb2.OP_KIND_PREFILL, batch=1, length=8, cached_tokens=4, decodes=2, decode_length=6, busy=train
    )
    move = node_pb2.GridPoint(op=offload, batch=1, length=3, num_bytes=1000)
    async with cluster(tmp_path) as made:
        node = await made.start_node()
        request = node_pb2.MeasureOpsRequest(points=[prefill, move], repetitions=2, rounds=2)
        *timed, last = [response async for response in node.stub.MeasureOps(request)]
        assert [response.point for response in timed] == [0, 1, 0, 1]
        assert not last.HasField("point")
        for item in timed[0].measurements:
            said = (item.cached_tokens, item.decodes, item.decode_length, item.busy, len(item.durations_s))
            assert said == (4, 2, 6, train, 2)
        moved = [(item.op, item.stage, item.num_bytes) for item in timed[1].measurements]
        assert moved == [(kind, stage, 1000) for stage in (0, 1) for kind in (offload, profile_pb2.OP_KIND_RELOAD)]


async def test_a_spent_budget_ends_the_measurement(tmp_path: Path) -> None:
    point = node_pb2.GridPoint(op=profile_pb2.OP_KIND_DECODE, batch=1, length=8)
    async with cluster(tmp_path) as made:
        node = await made.start_node()
        request = node_pb2.MeasureOpsRequest(points=[point], repetitions=1, rounds=100, budget_s=1e-9)
        (last,) = [response async for response in node.stub.MeasureOps(request)]
        assert not last.HasField("point")


async def test_a_point_too_large_for_the_memory_is_left_out(tmp_path: Path) -> None:
    def tamper(stage: int, op: StageOp, result: StageResult) -> StageResult:
        if isinstance(op, Measure) and op.batch == 7 and stage == 1:
            return replace(result, error="OutOfMemoryError: tried to allocate 7 GiB")
        return result

    points = [node_pb2.GridPoint(op=profile_pb2.OP_KIND_DECODE, batch=batch, length=8) for batch in (7, 1)]
    async with cluster(tmp_path) as made:
        node = await made.start_node(tamper=tamper)
        request = node_pb2.MeasureOpsRequest(points=points, repetitions=1, rounds=2)
        responses = [response async for response in node.stub.MeasureOps(request)]
        assert [response.point for response in responses[:-1]] == [0, 1, 1]
        assert "stage 1 cannot measure decode with batch 7" in responses[0].left_out_reason
        assert not responses[0].measurements


async def test_a_point_beside_work_too_large_for_the_memory_is_left_out(tmp_path: Path) -> None:
    def tamper(stage: int, op: StageOp, result: StageResult) -> StageResult:
        if isinstance(op, Measure) and op.kind == "train_forward":
            return replace(result, error="OutOfMemoryError: tried to allocate 7 GiB")
        return result

    beside = _points(busy=profile_pb2.OP_KIND_TRAIN_FORWARD)["points"]
    async with cluster(tmp_path) as made:
        node = await made.start_node(tamper=tamper)
        request = node_pb2.MeasureOpsRequest(points=beside + _points()["points"], repetitions=1)
        responses = [response async for response in node.stub.MeasureOps(request)]
        assert [response.point for response in responses[:-1]] == [0, 1]
        assert "cannot be kept busy: OutOfMemoryError" in responses[0].left_out_reason
        assert not responses[0].measurements
        assert responses[1].measurements


async def test_measuring_between_the_operations_of_a_busy_node(tmp_path: Path) -> None:
    """Work goes on, nothing of it is lost, and every point is measured."""
    gate = Gate()
    point = node_pb2.GridPoint(op=profile_pb2.OP_KIND_PREFILL, batch=1, length=8)
    request = node_pb2.MeasureOpsRequest(points=[point], repetitions=1, rounds=5, allow_busy=True)
    async with cluster(tmp_path) as made:
        node = await made.start_node(gate=gate)
        gate.close()
        await made.assign(inference_item("r1", [1], 40))
        await made.assign(training_item("job", 0, [[5, 6, 7, 8]], learning_rate=1e-2))
        await gate.until_waiting()
        call = node.stub.MeasureOps(request)
        gate.open()
        responses = [response async for response in call]
        assert [response.point for response in responses[:-1]] == [0] * 5
        request_done, trained = await made.scheduler.outcome("r1"), await made.scheduler.outcome("job/0")
        assert len(request_done.inference.token_ids) == 40
        assert not trained.training.HasField("error")


async def test_measuring_and_work_exclude_each_other(tmp_path: Path) -> None:
    gate = Gate()
    request = node_pb2.MeasureOpsRequest(
        points=[node_pb2.GridPoint(op=profile_pb2.OP_KIND_DECODE, batch=1, length=8)], repetitions=1
    )
    async with cluster(tmp_path) as made:
        node = await made.start_node(gate=gate)
        gate.close()
        await made.assign(inference_item("r1", [1], 1))
        await gate.until_waiting()
        with pytest.raises(Exception, match="the node has work"):
            _ = [response async for response in node.stub.MeasureOps(request)]
        gate.open()
        await made.scheduler.outcome("r1")
        gate.close()
        call = node.stub.MeasureOps(request)
        await gate.until_waiting()
        await made.assign(inference_item("r2", [1], 2))
        await made.scheduler.until(lambda: node.agent._intake.num_tasks == 1, "the task in the node")
        assert node.held_by_stages() == []
        gate.open()
        assert len([response async for response in call]) == 2
        await made.scheduler.outcome("r2")
        # A caller that goes away in the middle gives the stages back.
        gate.close()
        call = node.stub.MeasureOps(request)
        await gate.until_waiting()
        call.cancel()
        await made.assign(inference_item("r3", [1], 2))
        gate.open()
        await made.scheduler.outcome("r3")


async def test_a_new_queue_order_waits_for_a_measurement(tmp_path: Path) -> None:
    gate = Gate()
    request = node_pb2.MeasureOpsRequest(
        points=[node_pb2.GridPoint(op=profile_pb2.OP_KIND_DECODE, batch=1, length=8)], repetitions=1
    )
    async with cluster(tmp_path) as made:
        node = await made.start_node(gate=gate)
        gate.close()
        call = node.stub.MeasureOps(request)
        await gate.until_waiting()
        node.agent.on_welcome(scheduler_pb2.NodeWelcome(fencing_token=1, queue_order="fifo", lease_s=1.0))
        assert not node.agent._loop.accepts_work
        gate.open()
        assert len([response async for response in call]) == 2
        assert node.agent._loop.accepts_work
        await made.assign(inference_item("r1", [1], 1))
        await made.scheduler.outcome("r1")
        assert node.agent._loop._core.config.queue_order == "fifo"


async def test_outcomes_are_stored_before_the_node_stops(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        ledger = _UnsteadyLedger(await open_ledger(made.ledger_url))
        async with contextlib.AsyncExitStack() as life:
            node = await made.start_node(ledger=ledger, stack=life)
            ledger.away = True
            await made.assign(inference_item("r1", [1], 1))
            ledger.extra = (await made.ledger.read_node("node-0", count=1, block_s=0.0))[:1]
            ledger.reading_works = True
            await node.stream(("r1", 0))
            ledger.away = False
        record = await made.ledger.record("r1")
        assert record is not None
        assert record.outcome is not None


async def test_node_info(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        node = await made.start_node(num_stages=3, max_batch=5)
        info = await node.stub.GetNodeInfo(node_pb2.GetNodeInfoRequest())
        assert (info.node_id, info.model, info.num_stages, info.max_batch) == ("node-0", "model", 3, 5)
        assert (info.vocab_size, info.max_context_tokens, info.weight_step) == (97, 512, 0)
        assert info.profile_fingerprint == "fingerprint"
        assert len(info.worker_pids) == 3
        assert info.HasField("clock_slip")


async def test_a_task_of_the_node_that_ends_by_a_stray_cancellation_breaks_it(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        node = await made.start_node()
        node.agent._tasks[0].cancel()
        with pytest.raises(NodeBroken, match="a task of the node ended"):
            await node.agent.broken
