"""The agent's loop over real stages on a virtual clock: durations are the test's, so what overlaps is chosen."""

import asyncio
import heapq
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lemix.internal.v1 import scheduler_service_pb2, work_pb2
from services.node_agent.core.types import InferenceRequest, NodeCoreConfig, Tick, TrainingMicrobatch
from services.node_agent.engine.base import StageResult
from services.node_agent.engine.ops import Forget, StageOp
from services.node_agent.loop import AgentLoop
from services.node_agent.tasks import MicrobatchTask, RequestTask
from services.node_agent.weight_ops import WeightOp
from services.runtime.clock import FakeClock

Run = Callable[[StageOp], StageResult]
#: Turns of the event loop after which everything that follows from one event has happened.
_SETTLED_TURNS = 8


@dataclass(frozen=True, slots=True)
class Ran:
    """An op that a stage ran, in the order of their begins."""

    stage: int
    op: StageOp
    result: StageResult


class VirtualNode:
    """Give it work with `at`, then `finish`. Implements loop_ports.Listener."""

    def __init__(self, stages: Sequence[Run], duration_s: Callable[[int, StageOp], float], **config: object) -> None:
        self.ran: list[Ran] = []
        self.outcomes: dict[str, work_pb2.WorkOutcome] = {}
        self.weight_ops: list[WeightOp] = []
        self._clock = FakeClock()
        self._duration_s = duration_s
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self._waits: set[asyncio.Task[None]] = set()
        self.loop = AgentLoop(
            node_id="node",
            incarnation=1,
            workers=[_Worker(self, stage, run) for stage, run in enumerate(stages)],
            config=NodeCoreConfig(num_stages=len(stages), **config),  # type: ignore[arg-type]
            clock=self._clock,
            listener=self,
            op_timeout_s=1e9,
            max_optimizer_states=8,
        )
        self.loop.start()

    def at(self, time_s: float, act: Callable[[], object]) -> None:
        """Do this at a virtual time."""
        self._serial += 1
        heapq.heappush(self._due, (time_s, self._serial, lambda: (act(), None)[1]))

    def request(self, task: RequestTask, session_id: str = "", choice_of: str = "") -> None:
        """Take a request now."""
        need = InferenceRequest(
            task.task_id,
            self._clock.monotonic_s(),
            len(task.prompt_ids),
            task.max_tokens,
            reference_tokens=len(task.reference_ids),
            session_id=session_id,
            choice_of=choice_of,
        )
        self.loop.add_request(task, need)

    def microbatch(self, task: MicrobatchTask, parts: int = 1) -> None:
        """Take a micro-batch now, cut into pieces."""
        length = max(len(example.token_ids) for example in task.examples)
        work = TrainingMicrobatch(
            task.task_id,
            self._clock.monotonic_s(),
            task.job_id,
            task.sequence,
            len(task.examples),
            length,
            task.accumulation,
            task.last,
            parts,
        )
        self.loop.add_microbatch(task, work)

    def weight_op(self, subject: str, weight_op: WeightOp) -> None:
        """Ask for a weight operation now; it ends up in `weight_ops`."""

        async def wait() -> None:
            self.weight_ops.append(await self.loop.run_weight_op(subject, weight_op))

        self._waits.add(asyncio.create_task(wait()))

    async def finish(self) -> None:
        """Run until nothing is left. Raises NodeBroken."""
        await self._settle()
        while self._due or self.loop._core.next_wakeup_s is not None:
            wakeup_s = self.loop._core.next_wakeup_s
            if wakeup_s is not None and (not self._due or wakeup_s < self._due[0][0]):
                # Its timer runs on the clock of the event loop, which is not the virtual one.
                self.at(wakeup_s, lambda: self.loop._feed(Tick()))
            time_s, _, act = heapq.heappop(self._due)
            self._clock.advance(max(0.0, time_s - self._clock.monotonic_s()))
            act()
            await self._settle()
        await asyncio.gather(*self._waits)
        await self.loop.stop()

    async def _settle(self) -> None:
        for _ in range(_SETTLED_TURNS):
            await asyncio.sleep(0)
        if self.loop.broken.done():
            await self.loop.broken

    def start_op(self, stage: int, run: Run, op: StageOp) -> "asyncio.Future[StageResult]":
        """Run an op at once, and answer after its virtual duration."""
        answer: asyncio.Future[StageResult] = asyncio.get_running_loop().create_future()
        result = run(op)
        if isinstance(op, Forget):
            answer.set_result(result)
            return answer
        self.ran.append(Ran(stage, op, result))
        ends_s = self._clock.monotonic_s() + self._duration_s(stage, op)
        self.at(ends_s, lambda: answer.set_result(result))
        return answer

    # ------------------------------------------------------------- loop_ports.Listener

    def on_tokens(
        self, task_id: str, token_ids: Sequence[int], logprobs: Sequence[work_pb2.TokenLogprobs] = ()
    ) -> None:
        """See loop_ports.Listener."""

    def on_trace(self, trace: scheduler_service_pb2.OpTrace) -> None:
        """See loop_ports.Listener."""

    def on_outcome(self, outcome: work_pb2.WorkOutcome) -> None:
        """See loop_ports.Listener."""
        assert outcome.task_id not in self.outcomes
        self.outcomes[outcome.task_id] = outcome


class _Worker:
    """A stage of a virtual node. Implements StageWorker."""

    def __init__(self, node: VirtualNode, stage: int, run: Run) -> None:
        self._node = node
        self._stage = stage
        self._run = run

    @property
    def pid(self) -> int:
        """See StageWorker."""
        return os.getpid()

    def run(self, op: StageOp) -> "asyncio.Future[StageResult]":
        """See StageWorker."""
        return self._node.start_op(self._stage, self._run, op)

    async def close(self) -> None:
        """See StageWorker."""
