"""The loss on held-out examples, measured between other work: as training forwards whose activations are dropped."""

import asyncio
import math

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as scheduler_pb2
from services.node_agent.convert import example_from_proto
from services.node_agent.core.types import Op
from services.node_agent.engine.base import ModelInfo
from services.node_agent.engine.ops import StageOp
from services.node_agent.engine.training_ops import AdapterSpec, Example, TrainForward
from services.node_agent.loop import AgentLoop
from services.node_agent.weight_ops import WeightOp

_TASK_ID = "evaluation"


class Evaluator:
    """Measures one example at a time, so that nobody waits for more than one: they run before inference."""

    def __init__(self, loop: AgentLoop, info: ModelInfo) -> None:
        self._loop = loop
        self._info = info
        self._turn = asyncio.Lock()

    async def evaluate(self, command: scheduler_pb2.EvaluateCommand) -> scheduler_pb2.EvaluationReport:
        """Mean loss over the labels of all examples. Steps may come between them; each runs at one weights version on
        all stages. Several evaluations take turns."""
        report = scheduler_pb2.EvaluationReport(request_id=command.request_id)
        total = 0.0
        try:
            adapter = self._loop.adapters.held.get(command.adapter_id)
            if command.adapter_id and adapter is None:
                raise LemixError(ErrorCode.MODEL_NOT_FOUND, f"this node holds no adapter {command.adapter_id}")
            for index, item in enumerate(command.examples):
                task_id = f"{_TASK_ID}/{command.request_id}/{index}"
                example = example_from_proto(item, self._info)
                async with self._turn:
                    loss, label_tokens = await _one(self._loop, task_id, example, adapter)
                total += loss * label_tokens
                report.label_tokens += label_tokens
            if not report.label_tokens:
                raise LemixError(ErrorCode.INVALID_REQUEST, "there are no held-out examples")
            report.loss = total / report.label_tokens
        except LemixError as error:
            report.error.CopyFrom(error.to_proto())
        return report


async def _one(loop: AgentLoop, task_id: str, example: Example, adapter: AdapterSpec | None) -> tuple[float, int]:
    """Mean loss of one example (infinite when it is not finite), and its labels. Raises LemixError when it fails."""

    def payload(op: Op) -> StageOp:
        hidden = weight_op.results[-1].output if weight_op.results else None
        return TrainForward(op.op_id, op.version, task_id, (example,), hidden=hidden, adapter=adapter, measures=True)

    weight_op = WeightOp(False, payload, adapter_ids=() if adapter is None else (adapter.adapter_id,))
    try:
        await loop.run_weight_op(task_id, weight_op)
    finally:
        for runner in loop.runners:
            runner.forget(task_id)
    result = weight_op.results[-1]
    if result.error.startswith("ArithmeticError"):
        # What has diverged is as bad as can be, which is an answer.
        return math.inf, len(example.token_ids) - max(1, example.num_context_tokens)
    if result.error or result.loss is None:
        raise LemixError(ErrorCode.INTERNAL, f"a held-out example failed: {result.error[:200]}")
    return result.loss, result.label_tokens
