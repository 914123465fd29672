"""Runs the ops of one stage worker, one after the other."""

import asyncio
from collections import deque
from collections.abc import Callable

from services.node_agent.engine.base import Forget, Prefill, StageOp, StageResult, StageWorker, TrainForward, WorkerDied

#: More finished tasks than this are forgotten before the next op, whatever it is.
_MAX_PENDING_FORGETS = 64
#: An idle worker is asked for a sign of life this often, so that one that died does not wait for work to be noticed.
_PROBE_S = 1.0
#: Op id of ops that the core does not know.
AGENT_OP_ID = 0

Done = Callable[[StageResult], None]


class StageRunner:
    """One stage: takes ops in order and frees what ended tasks hold in between.

    Tasks are forgotten when the stage is idle, and at the latest before an op that takes memory. `on_broken` is called
    once with the exception when the worker died, did not answer an op within `op_timeout_s`, or anything unexpected was
    raised; the runner has ended then.
    """

    def __init__(
        self, stage: int, worker: StageWorker, on_broken: Callable[[BaseException], None], *, op_timeout_s: float
    ) -> None:
        self.stage = stage
        self._worker = worker
        self._on_broken = on_broken
        self._op_timeout_s = op_timeout_s
        self._ops: deque[tuple[StageOp, Done]] = deque()
        self._forgets: dict[str, None] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to take ops."""
        self._task = asyncio.create_task(self._run(), name=f"stage-{self.stage}")

    async def stop(self) -> None:
        """Stop after cancelling the wait for the running op; the worker itself is closed by its engine."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def submit(self, op: StageOp, done: Done) -> None:
        """Queue an op; `done` is called with its result. The caller bounds how many it queues (the core: one)."""
        self._ops.append((op, done))
        self._wake.set()

    async def call(self, op: StageOp) -> StageResult:
        """Queue an op and wait for its result. Cancelling the wait does not stop the op."""
        future: asyncio.Future[StageResult] = asyncio.get_running_loop().create_future()
        self.submit(op, lambda result: None if future.done() else future.set_result(result))
        return await future

    def forget(self, task_id: str) -> None:
        """Free what an ended task holds on this stage, soon."""
        self._forgets[task_id] = None
        self._wake.set()

    async def _run(self) -> None:
        try:
            while True:
                if self._forgets and (not self._ops or self._must_forget_first(self._ops[0][0])):
                    await self._flush_forgets()
                elif self._ops:
                    op, done = self._ops.popleft()
                    done(await self._ask(op))
                else:
                    await self._wait()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._on_broken(error)

    async def _ask(self, op: StageOp) -> StageResult:
        try:
            async with asyncio.timeout(self._op_timeout_s) as deadline:
                return await self._worker.run(op)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            worker = f"stage {self.stage} worker (pid {self._worker.pid})"
            message = f"{worker} did not answer {type(op).__name__} within {self._op_timeout_s:g} s"
            raise WorkerDied(message) from error

    def _must_forget_first(self, op: StageOp) -> bool:
        return isinstance(op, Prefill | TrainForward) or len(self._forgets) >= _MAX_PENDING_FORGETS

    async def _wait(self) -> None:
        """Until there is something to do; raises WorkerDied when the idle worker is gone."""
        self._wake.clear()
        try:
            async with asyncio.timeout(_PROBE_S):
                await self._wake.wait()
        except TimeoutError:
            await self._flush_forgets()

    async def _flush_forgets(self) -> None:
        task_ids = tuple(self._forgets)
        self._forgets.clear()
        result = await self._ask(Forget(AGENT_OP_ID, task_ids))
        if result.error:
            raise RuntimeError(f"stage {self.stage} cannot free {len(task_ids)} tasks: {result.error}")
