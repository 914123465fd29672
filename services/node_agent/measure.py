"""Times the real stages over a grid for the profiler. Leaves weights, caches and optimizers as they were."""

import math
from collections.abc import AsyncGenerator

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import node_agent_service_pb2 as node_pb2
from lemix.internal.v1 import profile_pb2
from services.latency import MOVES, OpKind
from services.node_agent.convert import OP_KIND_FROM_PROTO, OP_KIND_TO_PROTO, example_from_proto
from services.node_agent.engine.base import ModelInfo, StageResult
from services.node_agent.engine.handle import Handle
from services.node_agent.engine.ops import Measure
from services.node_agent.engine.training_ops import Example, TrainForward
from services.node_agent.loop import AgentLoop
from services.node_agent.stage_runner import AGENT_OP_ID

_MAX_REPETITIONS = 100
_MAX_WARMUP = 10
_MAX_POINTS = 10_000
_MAX_SAMPLES = 10_000
_SAMPLE_TASK_ID = "measure/sample"
#: Kinds a request may name; the backward is timed together with its forward.
_KINDS = frozenset(OpKind) - MOVES - {OpKind.TRAIN_BACKWARD}


class Measurer:
    """Answers MeasureOps on a node without work."""

    def __init__(self, loop: AgentLoop, info: ModelInfo) -> None:
        self._loop = loop
        self._info = info

    async def run(self, request: node_pb2.MeasureOpsRequest) -> AsyncGenerator[node_pb2.MeasureOpsResponse, None]:
        """One message per point, then one with the samples' losses and the memory.

        Raises LemixError: INVALID_REQUEST before anything is measured, CONFLICT when the node has work, INTERNAL when
        a stage fails. Work that comes meanwhile waits for the end.
        """
        samples = self._check(request)
        peak_bytes = [0] * self._loop.num_stages
        async with self._loop.exclusive():
            for point in request.points:
                measurements = []
                for stage in range(self._loop.num_stages):
                    result = await self._measure(stage, point, request.repetitions, request.warmup)
                    peak_bytes[stage] = max(peak_bytes[stage], result.resident_bytes)
                    measurements += _measurements(stage, point, result)
                yield node_pb2.MeasureOpsResponse(measurements=measurements)
            losses = [await self._loss(sample) for sample in samples]
            yield node_pb2.MeasureOpsResponse(sample_losses=losses, peak_memory_bytes=peak_bytes)

    def _check(self, request: node_pb2.MeasureOpsRequest) -> list[Example]:
        def refuse(message: str, param: str) -> LemixError:
            return LemixError(ErrorCode.INVALID_REQUEST, message, param=param)

        if not 1 <= request.repetitions <= _MAX_REPETITIONS:
            raise refuse(f"repetitions must be 1 to {_MAX_REPETITIONS}", "repetitions")
        if request.warmup > _MAX_WARMUP:
            raise refuse(f"warmup must be at most {_MAX_WARMUP}", "warmup")
        if len(request.points) > _MAX_POINTS or len(request.samples) > _MAX_SAMPLES:
            raise refuse(f"at most {_MAX_POINTS} points and {_MAX_SAMPLES} samples", "points")
        for index, point in enumerate(request.points):
            if OP_KIND_FROM_PROTO.get(point.op) not in _KINDS:
                raise refuse(f"operation {point.op} cannot be measured", f"points.{index}.op")
            if point.batch < 1 or not 1 <= point.length <= self._info.max_context_tokens:
                message = f"batch must be at least 1, length 1 to {self._info.max_context_tokens}"
                raise refuse(message, f"points.{index}")
        return [example_from_proto(sample, self._info) for sample in request.samples]

    async def _measure(self, stage: int, point: node_pb2.GridPoint, repetitions: int, warmup: int) -> StageResult:
        kind = OP_KIND_FROM_PROTO[point.op]
        op = Measure(AGENT_OP_ID, kind.value, point.batch, point.length, repetitions, warmup)
        result = await self._loop.runners[stage].call(op)
        if result.error:
            message = f"cannot measure {kind} with batch {point.batch}, length {point.length}: {result.error}"
            raise LemixError(ErrorCode.INTERNAL, message)
        return result

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


def _measurements(stage: int, point: node_pb2.GridPoint, result: StageResult) -> list[profile_pb2.Measurement]:
    return [
        profile_pb2.Measurement(
            stage=stage,
            op=OP_KIND_TO_PROTO[OpKind(kind)],
            batch=point.batch,
            length=point.length,
            durations_s=durations,
        )
        for kind, durations in result.durations_s
    ]
