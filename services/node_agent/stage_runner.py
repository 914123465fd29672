"""Runs the ops of one stage worker, one after the other."""

import asyncio
from collections import deque
from collections.abc import Callable

from services.node_agent.engine.base import StageResult, StageWorker, WorkerDied
from services.node_agent.engine.inference_ops import Prefill
from services.node_agent.engine.ops import Forget, StageOp
from services.node_agent.engine.training_ops import TrainForward

#: More finished tasks than this are forgotten before the next op, whatever it is.
_MAX_PENDING_FORGETS = 64
#: An idle worker is asked for a sign of life this often, so that one that died does not wait for work to be noticed.
_PROBE_S = 1.0
#: Op id of ops that the core does not know.
AGENT_OP_ID = 0

Done = Callable[[StageResult], None]


class StageRunner:
    """One stage: takes ops in order and frees what ended tasks hold in between.

    Tasks are forgotten when the stage is idle, and at the latest before an op that takes memory (forgets_first: before
    any op). `on_broken` is called once with the exception when the worker died, did not answer an op within
    `op_timeout_s`, or anything unexpected was raised; the runner has ended then.

    An op's end, what follows from it and the start of the next op are one callback: no task is woken in between.
    """

    def __init__(
        self,
        stage: int,
        worker: StageWorker,
        on_broken: Callable[[BaseException], None],
        *,
        op_timeout_s: float,
        forgets_first: bool = False,
    ) -> None:
        self.stage = stage
        self._worker = worker
        self._on_broken = on_broken
        self._op_timeout_s = op_timeout_s
        self._forgets_first = forgets_first
        self._ops: deque[tuple[StageOp, Done]] = deque()
        self._forgets: dict[str, None] = {}
        self._adapter_forgets: dict[str, None] = {}
        self._runs = False
        self._loop = asyncio.get_running_loop()
        # The op that the worker runs; None when it is idle.
        self._running: StageOp | None = None
        self._done: Done = self._forgotten
        self._answer: asyncio.Future[StageResult] | None = None
        #: When the running op was started, or the worker became idle; on the loop's clock.
        self._since_s = 0.0
        self._soon: asyncio.Handle | None = None
        self._watchdog: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to take ops."""
        self._runs = True
        self._since_s = self._loop.time()
        self._watch()
        self._next()

    def stop(self) -> None:
        """Stop after cancelling the wait for the running op; the worker itself is closed by its engine."""
        self._runs = False
        for pending in (self._watchdog, self._soon, self._answer):
            if pending is not None:
                pending.cancel()

    def submit(self, op: StageOp, done: Done) -> None:
        """Queue an op; `done` is called with its result. The caller bounds how many it queues (the core: one)."""
        self._ops.append((op, done))
        self._next()

    async def call(self, op: StageOp) -> StageResult:
        """Queue an op and wait for its result. Cancelling the wait does not stop the op."""
        future: asyncio.Future[StageResult] = self._loop.create_future()
        self.submit(op, lambda result: None if future.done() else future.set_result(result))
        return await future

    def forget(self, task_id: str) -> None:
        """Free what an ended task holds on this stage, soon."""
        self._forgets[task_id] = None
        self._forget_soon()

    def forget_adapter(self, adapter_id: str) -> None:
        """Free an adapter with its optimizer, soon; no op that is queued uses it."""
        self._adapter_forgets[adapter_id] = None
        self._forget_soon()

    def _forget_soon(self) -> None:
        if self._running is None and self._soon is None:
            # Not at once: the event that ended the task may bring the stage's next op, which then goes first.
            self._soon = self._loop.call_soon(self._next)

    # ------------------------------------------------------------- one after the other

    def _next(self) -> None:
        """Start what is next if the worker is idle."""
        self._soon = None
        if self._running is not None or not self._runs:
            return
        if self._ops and not self._must_forget_first(self._ops[0][0]):
            self._start(*self._ops.popleft())
        elif self._forgets or self._adapter_forgets:
            self._forget_all()

    def _must_forget_first(self, op: StageOp) -> bool:
        if self._adapter_forgets:
            return True
        if not self._forgets:
            return False
        return (
            self._forgets_first or isinstance(op, Prefill | TrainForward) or len(self._forgets) >= _MAX_PENDING_FORGETS
        )

    def _forget_all(self) -> None:
        task_ids = tuple(self._forgets)
        adapter_ids = tuple(self._adapter_forgets)
        self._forgets.clear()
        self._adapter_forgets.clear()
        self._start(Forget(AGENT_OP_ID, task_ids, adapter_ids), self._forgotten)

    def _forgotten(self, result: StageResult) -> None:
        if result.error:
            raise RuntimeError(f"stage {self.stage} cannot free what ended tasks hold: {result.error}")

    def _start(self, op: StageOp, done: Done) -> None:
        self._running, self._done = op, done
        self._since_s = self._loop.time()
        try:
            self._answer = self._worker.run(op)
        except Exception as error:
            self._break(error)
        else:
            self._answer.add_done_callback(self._ended)

    def _ended(self, answer: "asyncio.Future[StageResult]") -> None:
        if not self._runs:
            return
        try:
            self._done(answer.result())
        except (Exception, asyncio.CancelledError) as error:
            self._break(error)
        else:
            self._running = None
            self._since_s = self._loop.time()
            self._next()

    # ------------------------------------------------------------- when it goes wrong

    def _watch(self) -> None:
        """Now and then: give up a worker that runs one op for too long, and see whether an idle one is alive."""
        now_s = self._loop.time()
        # After a pause of the whole process the answer may be there without having been taken yet.
        is_waiting = self._answer is not None and not self._answer.done()
        if is_waiting and self._running is not None and now_s - self._since_s >= self._op_timeout_s:
            worker = f"stage {self.stage} worker (pid {self._worker.pid})"
            op = type(self._running).__name__
            self._break(WorkerDied(f"{worker} did not answer {op} within {self._op_timeout_s:g} s"))
            return
        self._watchdog = self._loop.call_later(min(_PROBE_S, self._op_timeout_s), self._watch)
        if self._running is None and now_s - self._since_s >= _PROBE_S:
            self._forget_all()

    def _break(self, error: BaseException) -> None:
        if self._runs:
            self.stop()
            self._on_broken(error)
