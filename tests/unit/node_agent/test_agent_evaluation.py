"""Held-out losses between other work."""

import asyncio

from lemix.internal.v1 import scheduler_service_pb2 as scheduler_pb2
from lemix.internal.v1 import work_pb2
from services.node_agent.engine.base import ModelInfo, StageResult
from services.node_agent.engine.inference_ops import Decode, Prefill, SampledToken, Sampling
from services.node_agent.engine.ops import StageOp
from services.node_agent.engine.training_ops import TrainForward
from services.node_agent.evaluation import Evaluator
from services.node_agent.tasks import RequestTask
from tests.parity.virtual_node import VirtualNode

INFO = ModelInfo(
    architecture="llama", num_layers=1, vocab_size=97, max_context_tokens=64, num_parameters=1000, eos_token_ids=()
)


def _run(op: StageOp) -> StageResult:
    """A stage whose every token is 5 and whose every loss is 2."""
    if isinstance(op, Prefill | Decode):
        tokens = tuple(SampledToken(sequence.request_id, 5) for sequence in op.sequences)
        return StageResult(op.op_id, 0.0, 0.0, 0, tokens=tokens)
    return StageResult(op.op_id, 0.0, 0.0, 0, loss=2.0, label_tokens=1)


async def test_inference_comes_between_the_examples_of_all_evaluations() -> None:
    node = VirtualNode([_run], lambda stage, op: 0.01)
    evaluator = Evaluator(node.loop, INFO)
    example = work_pb2.TrainingExample(token_ids=[1, 2])
    commands = [scheduler_pb2.EvaluateCommand(request_id=f"e{i}", examples=[example] * 2) for i in range(4)]
    evaluations: list[asyncio.Task[scheduler_pb2.EvaluationReport]] = []
    node.at(0.0, lambda: node.request(RequestTask("r", 0.0, (1, 2), Sampling(ignore_eos=True), 16)))
    for command in commands:
        node.at(0.001, lambda command=command: evaluations.append(asyncio.create_task(evaluator.evaluate(command))))
    await node.finish()
    assert [(report.loss, report.label_tokens) for report in await asyncio.gather(*evaluations)] == [(2.0, 2)] * 4
    order = "".join("e" if isinstance(ran.op, TrainForward) else "i" for ran in node.ran)
    assert order == "i" + "ei" * 8 + "i" * 7
