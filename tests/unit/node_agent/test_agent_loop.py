"""The loop between core and stages when things go wrong, and at its boundaries."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from lemix.errors import LemixError
from lemix.internal.v1 import scheduler_service_pb2, work_pb2
from services.node_agent.core.types import (
    InferenceRequest,
    NodeCoreConfig,
    NodeSnapshot,
    QueueOrder,
    TrainingMicrobatch,
)
from services.node_agent.engine.base import EngineConfig, StageResult
from services.node_agent.engine.emulated.engine import EmulatedEngine, Tamper, load_emulated_engine
from services.node_agent.engine.inference_ops import Sampling
from services.node_agent.engine.ops import StageOp
from services.node_agent.engine.training_ops import Example, OptimizerSpec, TrainBackward
from services.node_agent.loop import AgentLoop
from services.node_agent.loop_ports import NodeBroken
from services.node_agent.tasks import MicrobatchTask, RequestTask
from services.runtime.clock import SystemClock


class _Listener:
    def __init__(self) -> None:
        self.outcomes: dict[str, work_pb2.WorkOutcome] = {}
        self.changed = asyncio.Event()
        self.error: Exception | None = None

    def on_tokens(
        self, task_id: str, token_ids: Sequence[int], logprobs: Sequence[work_pb2.TokenLogprobs] = ()
    ) -> None:
        """See Listener."""

    def on_trace(self, trace: scheduler_service_pb2.OpTrace) -> None:
        """See Listener."""
        self.changed.set()

    def on_outcome(self, outcome: work_pb2.WorkOutcome) -> None:
        """See Listener."""
        assert outcome.task_id not in self.outcomes, "told twice"
        self.outcomes[outcome.task_id] = outcome
        self.changed.set()
        if self.error is not None:
            raise self.error

    async def until(self, *task_ids: str) -> None:
        """These tasks have ended."""
        async with asyncio.timeout(5.0):
            while not self.outcomes.keys() >= set(task_ids):
                self.changed.clear()
                await self.changed.wait()


class _Node:
    def __init__(self, loop: AgentLoop, engine: EmulatedEngine, listener: _Listener) -> None:
        self.loop = loop
        self.engine = engine
        self.listener = listener

    def request(self, task_id: str) -> None:
        now_s = SystemClock().monotonic_s()
        task = RequestTask(task_id, now_s, (1, 2), Sampling(ignore_eos=True), 2)
        self.loop.add_request(task, InferenceRequest(task_id, now_s, 2, 2))

    def microbatch(self, job_id: str, sequence: int, *, accumulation: int = 1, last: bool = False) -> None:
        task_id = f"{job_id}/{sequence}"
        spec = OptimizerSpec(learning_rate=1e-3)
        task = MicrobatchTask(task_id, job_id, sequence, (Example((1, 2)),), spec, accumulation)
        work = TrainingMicrobatch(task_id, SystemClock().monotonic_s(), job_id, sequence, 1, 2, accumulation, last)
        self.loop.add_microbatch(task, work)

    async def until(self, predicate: Callable[[NodeSnapshot], bool]) -> None:
        """The core is in this state after an op."""
        async with asyncio.timeout(5.0):
            while not predicate(self.loop.snapshot()):
                self.listener.changed.clear()
                await self.listener.changed.wait()
                await asyncio.sleep(0)  # the trace comes just before the core's step

    async def broken(self) -> BaseException:
        """What the node ended with."""
        async with asyncio.timeout(5.0):
            await asyncio.wait([self.loop.broken])
        error = self.loop.broken.exception()
        assert isinstance(error, NodeBroken)
        return error


@asynccontextmanager
async def _node(path: Path, tamper: Tamper | None = None, states: int = 2, **config: object) -> AsyncIterator[_Node]:
    (path / "config.json").write_text('{"vocab_size": 97}', encoding="utf-8")
    engine = load_emulated_engine(EngineConfig(model_path=str(path), num_stages=2), tamper=tamper)
    listener = _Listener()
    loop = AgentLoop(
        node_id="node",
        incarnation=1,
        workers=engine.workers,
        config=NodeCoreConfig(num_stages=2, **config),  # type: ignore[arg-type]
        clock=SystemClock(),
        listener=listener,
        op_timeout_s=60.0,
        max_optimizer_states=states,
    )
    loop.start()
    try:
        yield _Node(loop, engine, listener)
    finally:
        await loop.stop()
        await engine.close()


async def test_a_failure_on_a_timer_breaks_the_node(tmp_path: Path) -> None:
    async with _node(tmp_path, group_timeout_s=0.05) as node:
        node.microbatch("job", 0, accumulation=2)
        await node.until(lambda state: state.accumulated_microbatches == 1)
        node.loop._payloads._optimizers.clear()  # the step, due when the group times out, cannot be built
        assert str(await node.broken()) == "KeyError: 'job'"


async def test_a_failure_while_held_work_is_released_breaks_the_node(tmp_path: Path) -> None:
    async with _node(tmp_path, kv_capacity_tokens=1) as node:
        measuring = node.loop.exclusive()
        await measuring.__aenter__()
        node.request("r0")  # does not fit, so it ends as soon as the core sees it
        node.listener.error = RuntimeError("cannot report")
        with pytest.raises(RuntimeError, match="cannot report"):
            await measuring.__aexit__(None, None, None)
        assert str(await node.broken()) == "RuntimeError: cannot report"


async def test_a_cancelled_job_s_step_runs_although_other_jobs_crowd_its_optimizer_out(tmp_path: Path) -> None:
    async with _node(tmp_path, states=1, group_timeout_s=60.0) as node:
        node.microbatch("other", 0)
        await node.listener.until("other/0")
        node.microbatch("job", 0, accumulation=2)
        await node.until(lambda state: state.accumulated_microbatches == 1)
        node.microbatch("other", 1)
        assert node.loop.cancel("job/0")
        await node.listener.until("other/1", "job/0")
        assert not node.loop.broken.done()
        assert node.loop.snapshot().versions == (3, 3)


async def test_a_gradient_that_never_reached_stage_0_changes_no_weights(tmp_path: Path) -> None:
    def fail_backward(stage: int, op: StageOp, result: StageResult) -> StageResult:
        failed = isinstance(op, TrainBackward) and stage == 0
        return replace(result, error="RuntimeError: no") if failed else result

    async with _node(tmp_path, fail_backward) as node:
        node.microbatch("job", 0)
        await node.listener.until("job/0")
        await node.until(lambda state: state.versions == (1, 1))
        weights = [worker.stage.weight for worker in node.engine.workers]
        assert weights[0] == weights[1] == 4.0
        assert node.listener.outcomes["job/0"].training.HasField("error")
        assert node.loop.ages.at(1) is None, "the version holds no optimizer step"


async def test_a_node_with_gradients_is_not_idle(tmp_path: Path) -> None:
    """Neither a measurement nor a new queue order may come between a backward and its step."""
    async with _node(tmp_path, group_timeout_s=60.0) as node:
        node.microbatch("job", 0, accumulation=3)
        await node.until(lambda state: state.accumulated_microbatches == 1)
        node.loop.set_queue_order(QueueOrder.FIFO)
        assert not node.loop.accepts_work
        assert node.loop.cancel("job/0")  # its group's step is on its way now, with no task left
        with pytest.raises(LemixError, match="the node has work"):
            async with node.loop.exclusive():
                raise AssertionError("must not be entered")
        await node.until(lambda state: state.versions == (1, 1))
        assert node.loop.accepts_work
