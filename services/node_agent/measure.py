"""Times the real stages over a grid for the profiler. Leaves weights, caches and optimizers as they were."""

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, AsyncIterator

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import node_agent_service_pb2 as node_pb2
from lemix.internal.v1 import profile_pb2
from services.latency import OpKind
from services.node_agent.convert import OP_KIND_FROM_PROTO, OP_KIND_TO_PROTO
from services.node_agent.engine.base import MeasuredMemory, ModelInfo, StageResult
from services.node_agent.engine.handle import Handle
from services.node_agent.engine.ops import Measure
from services.node_agent.engine.training_ops import Example, TrainForward
from services.node_agent.loop import AgentLoop
from services.node_agent.measure_request import check_request
from services.node_agent.stage_runner import AGENT_OP_ID, StageRunner

_SAMPLE_TASK_ID = "measure/sample"
#: What keeps the other stages busy: sequences, tokens of each, repetitions per op. An op too short would leave a stage
#: idle between two of them, one too long goes on when the point has been measured.
_BUSY_SHAPES = {OpKind.DECODE: (8, 256, 8), OpKind.TRAIN_FORWARD: (1, 256, 2)}
#: Errors that say a point is too large for this machine; the others say that the stage does not work.
_TOO_LARGE = ("MemoryError", "OutOfMemoryError", "KvCacheFull")


class _LeftOut(Exception):
    """A point does not fit into memory; the message says on which stage."""


class Measurer:
    """Answers MeasureOps."""

    def __init__(self, loop: AgentLoop, info: ModelInfo) -> None:
        self._loop = loop
        self._info = info

    async def run(self, request: node_pb2.MeasureOpsRequest) -> AsyncGenerator[node_pb2.MeasureOpsResponse, None]:
        """One message per point and round, then one of the node: the samples' losses and the memory.

        Raises LemixError: INVALID_REQUEST before anything is measured, CONFLICT when the node has work (allow_busy:
        when it is being measured), INTERNAL when a stage fails. Work that comes meanwhile waits for the end, with
        allow_busy for the end of a point.
        """
        capacity = self._loop.snapshot().kv_capacity_tokens
        samples = check_request(request, self._info, num_stages=self._loop.num_stages, kv_capacity_tokens=capacity or 0)
        memory = [MeasuredMemory(0)] * self._loop.num_stages
        peak_bytes = [0] * self._loop.num_stages
        async with contextlib.AsyncExitStack() as stack:
            if not request.allow_busy:
                await stack.enter_async_context(self._loop.exclusive())
            grid = await stack.enter_async_context(contextlib.aclosing(self._grid(request)))
            async for response, results in grid:
                for stage, result in enumerate(results):
                    memory[stage] = result.memory or memory[stage]
                    peak_bytes[stage] = max(peak_bytes[stage], memory[stage].resident_bytes)
                yield response
            losses = [await self._loss(sample) for sample in samples]
        yield node_pb2.MeasureOpsResponse(
            sample_losses=losses,
            peak_memory_bytes=peak_bytes,
            memory=[
                profile_pb2.StageMemory(
                    stage=stage, weight_bytes=item.weight_bytes, kv_bytes_per_token=item.kv_bytes_per_token
                )
                for stage, item in enumerate(memory)
                if item.weight_bytes
            ],
        )

    async def _grid(
        self, request: node_pb2.MeasureOpsRequest
    ) -> AsyncGenerator[tuple[node_pb2.MeasureOpsResponse, list[StageResult]], None]:
        """Points in rounds until the budget is spent, each with the results of the stages."""
        clock = asyncio.get_running_loop()
        end_s = clock.time() + request.budget_s if request.budget_s else math.inf
        left_out: set[int] = set()
        for _ in range(max(1, request.rounds)):
            for index, point in enumerate(request.points):
                if index in left_out:
                    continue
                begin_s = clock.time()
                if begin_s >= end_s:
                    return
                response = node_pb2.MeasureOpsResponse(point=index)
                results: list[StageResult] = []
                try:
                    async with self._stages(request.allow_busy):
                        for stage in range(self._loop.num_stages):
                            result = await self._measure(stage, point, request.repetitions, request.warmup)
                            response.measurements.extend(_measurements(stage, point, result))
                            results.append(result)
                except _LeftOut as reason:
                    left_out.add(index)
                    del response.measurements[:]
                    response.left_out_reason = str(reason)
                yield response, results
                if request.allow_busy:
                    # As long as the node's work waited, it may now go on.
                    await asyncio.sleep(min(clock.time() - begin_s, max(0.0, end_s - clock.time())))

    @contextlib.asynccontextmanager
    async def _stages(self, allow_busy: bool) -> AsyncIterator[None]:
        """The stages, for one point; without allow_busy they are held for the whole grid."""
        if not allow_busy:
            yield
            return
        async with self._loop.paused():
            yield

    async def _measure(self, stage: int, point: node_pb2.GridPoint, repetitions: int, warmup: int) -> StageResult:
        kind = OP_KIND_FROM_PROTO[point.op]
        op = Measure(
            AGENT_OP_ID,
            kind.value,
            point.batch,
            point.length,
            repetitions,
            warmup,
            cached_tokens=point.cached_tokens,
            decodes=point.decodes,
            decode_length=point.decode_length,
            num_bytes=point.num_bytes,
            beside=OP_KIND_FROM_PROTO[point.busy].value if point.busy else "",
        )
        async with self._others_busy(stage, point.busy):
            result = await self._loop.runners[stage].call(op)
        if result.error:
            message = f"stage {stage} cannot measure {kind} with batch {point.batch}, length {point.length}"
            raise _failure(message, result.error)
        return result

    @contextlib.asynccontextmanager
    async def _others_busy(self, stage: int, busy: profile_pb2.OpKind) -> AsyncIterator[None]:
        """The other stages run `busy` again and again meanwhile; they are idle again afterwards."""
        if busy == profile_pb2.OP_KIND_UNSPECIFIED:
            yield
            return
        kind = OP_KIND_FROM_PROTO[busy]
        batch, length, repetitions = _BUSY_SHAPES[kind]
        length = min(length, self._info.max_context_tokens - 1)
        op = Measure(AGENT_OP_ID, kind.value, batch, max(1, length), repetitions, 0)
        ended = asyncio.Event()

        async def keep_busy(runner: StageRunner) -> None:
            while not ended.is_set():
                result = await runner.call(op)
                if result.error:
                    raise _failure(f"stage {runner.stage} cannot be kept busy", result.error)

        tasks = [asyncio.create_task(keep_busy(runner)) for runner in self._loop.runners if runner.stage != stage]
        await asyncio.sleep(0)  # their first ops are on the stages now
        try:
            yield
            ended.set()
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _loss(self, sample: Example) -> float:
        """Loss of one sample: a training forward whose activations are dropped instead of going back."""
        version = self._loop.ages.newest_step
        hidden: Handle | None = None
        result: StageResult | None = None
        try:
            for runner in self._loop.runners:
                op = TrainForward(AGENT_OP_ID, version, _SAMPLE_TASK_ID, (sample,), hidden=hidden)
                result = await runner.call(op)
                if result.error:
                    raise LemixError(ErrorCode.INTERNAL, f"cannot compute a sample's loss: {result.error}")
                hidden = result.output
        finally:
            for runner in self._loop.runners:
                runner.forget(_SAMPLE_TASK_ID)
        if result is None or result.loss is None or not math.isfinite(result.loss):
            raise LemixError(ErrorCode.INTERNAL, "a sample has no finite loss")
        return result.loss


def _failure(message: str, error: str) -> Exception:
    """What to raise for an op that failed."""
    if error.startswith(_TOO_LARGE):
        return _LeftOut(f"{message}: {error}")
    return LemixError(ErrorCode.INTERNAL, f"{message}: {error}")


def _measurements(stage: int, point: node_pb2.GridPoint, result: StageResult) -> list[profile_pb2.Measurement]:
    memory = result.memory
    return [
        profile_pb2.Measurement(
            stage=stage,
            op=OP_KIND_TO_PROTO[OpKind(kind)],
            batch=point.batch,
            length=point.length,
            durations_s=durations,
            cached_tokens=point.cached_tokens,
            decodes=point.decodes,
            decode_length=point.decode_length,
            num_bytes=0 if memory is None else memory.moved_bytes,
            busy=point.busy,
            peak_bytes=0 if memory is None else memory.peak_bytes,
        )
        for kind, durations in result.durations_s
    ]
