"""A node without its network: the agent's loop over stage workers, as in production."""

import asyncio
from collections.abc import Sequence

from lemix.internal.v1 import scheduler_service_pb2, work_pb2
from services.node_agent.core.types import InferenceRequest, NodeCoreConfig, TrainingMicrobatch
from services.node_agent.engine.base import StageWorker
from services.node_agent.engine.inference_ops import Sampling
from services.node_agent.engine.training_ops import Example, OptimizerSpec
from services.node_agent.loop import AgentLoop
from services.node_agent.tasks import MicrobatchTask, RequestTask
from services.runtime.clock import SystemClock

_TIMEOUT_S = 600.0


class Node:
    """Runs tasks and waits for their ends. Implements loop.Listener."""

    def __init__(self, workers: Sequence[StageWorker], **config: object) -> None:
        self._clock = SystemClock()
        self._ends: dict[str, asyncio.Future[work_pb2.WorkOutcome]] = {}
        self._sequence = 0
        self.loop = AgentLoop(
            node_id="node",
            incarnation=1,
            workers=workers,
            config=NodeCoreConfig(num_stages=len(workers), **config),  # type: ignore[arg-type]
            clock=self._clock,
            listener=self,
            op_timeout_s=_TIMEOUT_S,
            max_optimizer_states=1,
        )
        self.pids = [worker.pid for worker in workers]
        self.loop.start()

    async def train(self, batches: Sequence[Sequence[tuple[int, ...]]], optimizer: OptimizerSpec) -> None:
        """One optimizer step per batch of examples. Raises RuntimeError when one failed."""
        ends = []
        for batch in batches:
            examples = tuple(Example(tokens) for tokens in batch)
            task = MicrobatchTask(f"job/{self._sequence}", "job", self._sequence, examples, optimizer)
            length = max(len(example.token_ids) for example in examples)
            work = TrainingMicrobatch(
                task.task_id, self._clock.monotonic_s(), "job", self._sequence, len(examples), length
            )
            self._sequence += 1
            ends.append(self._end_of(task.task_id))
            self.loop.add_microbatch(task, work)
        await self._all(ends)

    async def generate(self, prompts: Sequence[tuple[int, ...]], max_tokens: int) -> list[list[int]]:
        """Greedy outputs of requests that arrive together. Raises RuntimeError when one failed."""
        ends = []
        for prompt in prompts:
            task = RequestTask(
                f"r{self._sequence}", self._clock.monotonic_s(), prompt, Sampling(ignore_eos=True), max_tokens
            )
            self._sequence += 1
            ends.append(self._end_of(task.task_id))
            request = InferenceRequest(task.task_id, self._clock.monotonic_s(), len(prompt), max_tokens)
            self.loop.add_request(task, request)
        return [list(outcome.inference.token_ids) for outcome in await self._all(ends)]

    async def close(self) -> None:
        """Stop; the workers are their engine's."""
        await self.loop.stop()

    def _end_of(self, task_id: str) -> asyncio.Future[work_pb2.WorkOutcome]:
        self._ends[task_id] = asyncio.get_running_loop().create_future()
        return self._ends[task_id]

    async def _all(self, ends: Sequence[asyncio.Future[work_pb2.WorkOutcome]]) -> list[work_pb2.WorkOutcome]:
        done = asyncio.gather(*ends)
        await asyncio.wait((done, self.loop.broken), return_when=asyncio.FIRST_COMPLETED, timeout=_TIMEOUT_S)
        if not done.done():
            done.cancel()
            raise RuntimeError(f"the node did not finish: {self.loop.broken}")
        outcomes = done.result()
        for outcome in outcomes:
            part = outcome.training if outcome.HasField("training") else outcome.inference
            if part.HasField("error"):
                raise RuntimeError(f"{outcome.task_id} failed: {part.error.message}")
        return outcomes

    # ------------------------------------------------------------- loop.Listener

    def on_tokens(
        self, task_id: str, token_ids: Sequence[int], logprobs: Sequence[work_pb2.TokenLogprobs] = ()
    ) -> None:
        """See loop.Listener."""

    def on_trace(self, trace: scheduler_service_pb2.OpTrace) -> None:
        """See loop.Listener."""

    def on_outcome(self, outcome: work_pb2.WorkOutcome) -> None:
        """See loop.Listener."""
        self._ends.pop(outcome.task_id).set_result(outcome)
