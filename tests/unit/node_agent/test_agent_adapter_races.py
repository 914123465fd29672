"""An adapter is deleted, restored away or never made while work that uses it is on its way through the stages."""

import asyncio
from collections.abc import Sequence

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as scheduler_pb2
from lemix.internal.v1 import work_pb2
from services.latency import OpKind
from services.node_agent.convert import OP_KIND_FROM_PROTO
from services.node_agent.engine.base import ModelInfo, StageResult
from services.node_agent.engine.inference_ops import Decode, Prefill, SampledToken
from services.node_agent.engine.ops import Forget, StageOp
from services.node_agent.engine.training_ops import (
    AdapterSpec,
    Example,
    OptimizerSpec,
    OptimizerStep,
    TrainForward,
)
from services.node_agent.evaluation import Evaluator
from services.node_agent.tasks import MicrobatchTask
from tests.parity.virtual_node import VirtualNode

INFO = ModelInfo(
    architecture="llama", num_layers=2, vocab_size=97, max_context_tokens=64, num_parameters=1000, eos_token_ids=()
)
ISOLATED = AdapterSpec("job-1", isolated=True)


class Stages:
    """Stages without a model, and what they were told to do in order. fails: forwards fail on the last one."""

    def __init__(self, count: int, *, fails: bool = False) -> None:
        self.ops: list[tuple[int, StageOp]] = []
        self._versions = [0] * count
        self._fails = fails

    def run(self, stage: int, op: StageOp) -> StageResult:
        self.ops.append((stage, op))
        is_last = stage == len(self._versions) - 1
        if isinstance(op, OptimizerStep):
            self._versions[stage] += 1
        version = self._versions[stage]
        if isinstance(op, Prefill | Decode):
            tokens = tuple(SampledToken(sequence.request_id, 5) for sequence in op.sequences) if is_last else ()
            return StageResult(op.op_id, 0.0, 0.0, version, tokens=tokens)
        if isinstance(op, TrainForward):
            error = "MemoryError: no room" if self._fails and is_last else ""
            loss = 2.0 if is_last and not error else None
            return StageResult(op.op_id, 0.0, 0.0, version, loss=loss, label_tokens=1, error=error)
        return StageResult(op.op_id, 0.0, 0.0, version, grad_norm_sq=1.0)

    def forgets(self, adapter_id: str) -> list[int]:
        """Stages that were told to free an adapter."""
        return [stage for stage, op in self.ops if isinstance(op, Forget) and adapter_id in op.adapter_ids]


class TracedNode(VirtualNode):
    """Keeps its traces."""

    traces: Sequence[scheduler_pb2.OpTrace] = ()

    def on_trace(self, trace: scheduler_pb2.OpTrace) -> None:
        self.traces = (*self.traces, trace)


def made(stages: int = 1, *, fails: bool = False) -> tuple[TracedNode, Stages]:
    ran = Stages(stages, fails=fails)
    node = TracedNode(
        [lambda op, stage=stage: ran.run(stage, op) for stage in range(stages)],  # type: ignore[misc]
        lambda stage, op: 0.01,
    )
    return node, ran


def microbatch(task_id: str = "m", spec: AdapterSpec | None = ISOLATED) -> MicrobatchTask:
    job_id = "full" if spec is None else spec.adapter_id
    return MicrobatchTask(task_id, job_id, 0, (Example((1, 2)),), OptimizerSpec(), adapter=spec)


async def test_the_last_step_of_a_deleted_isolated_adapter_does_not_count_as_the_models() -> None:
    """Its micro-batch is cancelled in its backward, so nobody but the step uses the adapter; or in the step itself."""
    for cancelled_s in (0.015, 0.025):
        node, stages = made()
        node.at(0.0, lambda node=node: node.microbatch(microbatch()))  # type: ignore[misc]
        node.at(cancelled_s, lambda node=node: node.loop.forget_adapter("job-1"))  # type: ignore[misc]
        await node.finish()
        (step,) = [trace for trace in node.traces if OP_KIND_FROM_PROTO[trace.op] is OpKind.OPTIMIZER_STEP]
        assert step.isolated
        assert node.loop.ages.newest_step == 1
        assert (node.loop.ages.at(1), node.loop.ages.job_of(1)) == (None, "")
        assert not node.loop.adapters.weights_changed
        assert stages.forgets("job-1") == [0]


async def test_an_adapter_stays_until_the_evaluation_that_uses_it_has_left_the_stages() -> None:
    """Stages make what they lack: the next example would bring a freed one back for ever."""
    node, stages = made(2)
    node.loop.adapters.expect(ISOLATED)
    node.loop.adapters.made(ISOLATED)
    command = scheduler_pb2.EvaluateCommand(
        request_id="e", adapter_id="job-1", examples=[work_pb2.TrainingExample(token_ids=[1, 2])] * 3
    )
    reports: list[asyncio.Task[scheduler_pb2.EvaluationReport]] = []
    evaluate = Evaluator(node.loop, INFO).evaluate
    node.at(0.0, lambda: reports.append(asyncio.create_task(evaluate(command))))
    node.at(0.005, lambda: node.loop.forget_adapter("job-1"))
    await node.finish()
    (report,) = await asyncio.gather(*reports)
    assert LemixError.from_proto(report.error).code is ErrorCode.CANCELLED
    used = [index for index, (_, op) in enumerate(stages.ops) if isinstance(op, TrainForward)]
    freed = [index for index, (_, op) in enumerate(stages.ops) if isinstance(op, Forget) and op.adapter_ids]
    assert (len(used), len(freed)) == (2, 2)
    assert max(used) < min(freed)


async def test_an_adapter_that_could_not_be_made_leaves_its_place() -> None:
    node, stages = made(2, fails=True)
    node.at(0.0, lambda: node.microbatch(microbatch()))
    await node.finish()
    assert node.outcomes["m"].training.HasField("error")
    assert sorted(stages.forgets("job-1")) == [0, 1]
    for index in range(16):  # its max_adapters
        node.loop.adapters.expect(AdapterSpec(f"other-{index}"))


async def test_an_online_adapter_is_made_anew_after_a_checkpoint_without_it() -> None:
    node, stages = made()
    spec = AdapterSpec("job-1")
    node.at(0.0, lambda: node.microbatch(microbatch(spec=spec)))
    node.at(0.005, lambda: node.loop.adopt_adapters((), weights_changed=False, trained_unix_s={}))
    await node.finish()
    assert not node.outcomes["m"].training.HasField("error")
    assert not node.loop.adapters.weights_changed
    assert dict(node.loop.adapters.held) == {"job-1": spec}
    assert stages.forgets("job-1") == []
