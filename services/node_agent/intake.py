"""Between the ledger and the loop: takes work up to a bound, and puts down what became of it.

A task counts against the bound until its outcome is in the ledger, so that with the store away the node finishes what
it has, keeps those outcomes, and takes nothing new.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable

import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import work_pb2
from services.ledger import Delivery, Ledger, LedgerUnavailable, TaskState
from services.node_agent import metrics
from services.node_agent.checkpoints import Checkpointer
from services.node_agent.convert import microbatch_from_proto, refusal_to_proto, request_from_proto
from services.node_agent.engine.base import ModelInfo
from services.node_agent.loop import AgentLoop
from services.node_agent.stop_texts import StopTexts
from services.node_agent.tokens import TokenHub
from services.runtime.clock import Clock

_log = structlog.get_logger()

_BLOCK_S = 1.0
_RETRY_FIRST_S = 0.1
_RETRY_MAX_S = 2.0
#: Cancellations remembered for tasks that have not been read yet.
_MAX_EARLY_CANCELS = 1024

Report = Callable[[work_pb2.WorkOutcome], None]


class Intake:
    """Reads the node's stream and finishes its tasks. `report` is called for outcomes that are in the ledger."""

    def __init__(
        self,
        *,
        node_id: str,
        ledger: Ledger,
        loop: AgentLoop,
        hub: TokenHub,
        info: ModelInfo,
        stops: StopTexts,
        clock: Clock,
        max_tasks: int,
        max_training_parts: int,
        report: Report,
        checkpoints: Checkpointer | None = None,
    ) -> None:
        self._node_id = node_id
        self._ledger = ledger
        self._loop = loop
        self._hub = hub
        self._info = info
        self._stops = stops
        self._clock = clock
        self._max_tasks = max_tasks
        self._max_training_parts = max_training_parts
        self._report = report
        self._checkpoints = checkpoints
        #: Micro-batches that wait for a checkpoint before they are started; bounded like all that is taken.
        self._waiting: dict[str, work_pb2.WorkItem] = {}
        if checkpoints is not None:
            checkpoints.on_room = self._start_waiting
        #: Newest fencing token seen.
        self.newest_token = 0
        # Task id -> newest entry of its delivery, until its outcome is in the ledger.
        self._entries: dict[str, str] = {}
        self._finished: deque[work_pb2.WorkOutcome] = deque()
        self._early_cancels: OrderedDict[str, None] = OrderedDict()
        self._changed = asyncio.Event()

    @property
    def num_tasks(self) -> int:
        """Tasks taken whose outcome is not in the ledger yet."""
        return len(self._entries)

    @property
    def _num_held_back(self) -> int:
        return 0 if self._checkpoints is None else self._checkpoints.num_unsaved

    def held_back(self) -> None:
        """One more task waits for nothing but a checkpoint."""
        self._changed.set()

    # ------------------------------------------------------------- from the session and the loop

    def cancel(self, task_id: str) -> None:
        """Drop a task. One that has not been read yet is finished as cancelled when it comes."""
        waiting = self._waiting.pop(task_id, None)
        if waiting is not None:
            error = LemixError(ErrorCode.CANCELLED, "cancelled before it was started")
            self.finish(refusal_to_proto(waiting, error, node_id=self._node_id))
        elif self._checkpoints is not None and self._checkpoints.release(task_id):
            return
        elif not self._loop.cancel(task_id) and task_id not in self._entries:
            self._early_cancels[task_id] = None
            while len(self._early_cancels) > _MAX_EARLY_CANCELS:
                self._early_cancels.popitem(last=False)

    def finish(self, outcome: work_pb2.WorkOutcome) -> None:
        """Put an outcome into the ledger, soon."""
        self._finished.append(outcome)
        self._changed.set()

    # ------------------------------------------------------------- taking

    async def run_reader(self) -> None:
        """Take work until cancelled."""
        while True:
            free = self._max_tasks - (len(self._entries) - self._num_held_back)
            if free <= 0 or not self._loop.accepts_work:
                await self._wait_for_room()
                continue
            for delivery in await self._read(free):
                await self._take(delivery)

    async def _wait_for_room(self) -> None:
        self._changed.clear()
        try:
            async with asyncio.timeout(_BLOCK_S):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _read(self, count: int) -> list[Delivery]:
        delay_s = _RETRY_FIRST_S
        while True:
            try:
                return await self._ledger.read_node(self._node_id, count=count, block_s=_BLOCK_S)
            except LedgerUnavailable as error:
                _log.warning("cannot read work, will retry", error=str(error), retry_s=delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, _RETRY_MAX_S)

    async def _take(self, delivery: Delivery) -> None:
        item = delivery.item
        if item.task_id in self._entries:
            self._entries[item.task_id] = delivery.entry_id  # delivered again: the newer entry is the one to finish
            return
        if item.fencing_token < self.newest_token and not await self._is_ours(item.task_id):
            metrics.REFUSED.labels("stale_token").inc()
            _log.warning(
                "refused work of an older scheduler",
                task=item.task_id,
                token=item.fencing_token,
                newest=self.newest_token,
            )
            return
        self.newest_token = max(self.newest_token, item.fencing_token)
        self._entries[item.task_id] = delivery.entry_id
        if self._checkpoints is None or not item.HasField("training"):
            self._start_or_refuse(item)
            return
        known = self._checkpoints.known_outcome(item.task_id)
        if known is not None:
            self.finish(known)  # the checkpoint this node started from contains it
        elif self._waiting or self._checkpoints.is_full:
            self._waiting[item.task_id] = item
        else:
            self._start_or_refuse(item)

    def _start_waiting(self) -> None:
        """A checkpoint was saved."""
        while self._waiting and self._checkpoints is not None and not self._checkpoints.is_full:
            self._start_or_refuse(self._waiting.pop(next(iter(self._waiting))))
        self._changed.set()

    def _start_or_refuse(self, item: work_pb2.WorkItem) -> None:
        try:
            self._start(item)
        except LemixError as error:
            metrics.REFUSED.labels(error.code.value).inc()
            outcome = refusal_to_proto(item, error, node_id=self._node_id)
            if outcome.HasField("inference"):
                self._hub.finish(item.task_id, outcome.inference)
            self.finish(outcome)

    async def _is_ours(self, task_id: str) -> bool:
        """Whether the ledger still says that this node holds the task.

        A scheduler's successor leaves running work where it is, so an older token alone does not make it stale.
        """
        while True:
            try:
                record = await self._ledger.record(task_id)
            except LedgerUnavailable:
                await asyncio.sleep(_RETRY_MAX_S)
            else:
                return record is not None and record.state is TaskState.ASSIGNED and record.node_id == self._node_id

    def _start(self, item: work_pb2.WorkItem) -> None:
        """Give a task to the loop. Raises LemixError when it must not or cannot run."""
        now_s, now_unix_s = self._clock.monotonic_s(), self._clock.unix_s()
        if item.task_id in self._early_cancels:
            del self._early_cancels[item.task_id]
            raise LemixError(ErrorCode.CANCELLED, "cancelled before it was started")
        match item.WhichOneof("work"):
            case "inference":
                if 0 < item.inference.deadline_unix_s <= now_unix_s:
                    raise LemixError(ErrorCode.DEADLINE_EXCEEDED, "its deadline passed before the node could start it")
                task, request = request_from_proto(
                    item.task_id, item.inference, self._info, now_s=now_s, now_unix_s=now_unix_s
                )
                sampling = item.inference.sampling
                task.stop_text = self._stops.follow(sampling.stop, sampling.min_tokens)
                self._hub.begin(item.task_id)
                self._loop.add_request(task, request)
            case "training":
                if self._checkpoints is not None:
                    self._checkpoints.expect(item.training)
                task_and_core = microbatch_from_proto(
                    item.task_id,
                    item.training,
                    self._info,
                    now_s=now_s,
                    num_stages=self._loop.num_stages,
                    most_parts=self._max_training_parts,
                )
                self._loop.add_microbatch(*task_and_core)
            case _:
                raise LemixError(ErrorCode.UNSUPPORTED, "the node does not know this kind of work")

    # ------------------------------------------------------------- finishing

    async def wait_empty(self) -> None:
        """Until every task taken has its outcome in the ledger, or waits for nothing but a checkpoint."""
        while len(self._entries) > self._num_held_back:
            self._changed.clear()
            await self._changed.wait()

    async def run_finisher(self) -> None:
        """Put outcomes into the ledger, in order, until cancelled."""
        delay_s = _RETRY_FIRST_S
        while True:
            if not self._finished:
                await self._wait_for_room()
                continue
            try:
                await self._finish_next()
            except LedgerUnavailable as error:
                _log.warning("cannot store an outcome, will retry", error=str(error), retry_s=delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, _RETRY_MAX_S)
            else:
                delay_s = _RETRY_FIRST_S

    async def flush(self, timeout_s: float) -> None:
        """Store what has ended before the node stops, so that nobody runs it again. The finisher must have ended."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._finished:
                    await self._finish_next()
        except (TimeoutError, LedgerUnavailable) as error:
            _log.warning("outcomes not stored; their tasks will run again", count=len(self._finished), error=str(error))

    async def _finish_next(self) -> None:
        outcome = self._finished[0]
        await self._finish(outcome)
        self._finished.popleft()
        del self._entries[outcome.task_id]
        if self._checkpoints is not None:
            self._checkpoints.confirmed(outcome.task_id)
        self._changed.set()

    async def _finish(self, outcome: work_pb2.WorkOutcome) -> None:
        if await self._ledger.finish(self._node_id, self._entries[outcome.task_id], outcome):
            self._report(outcome)
            return
        # Done already, perhaps by an attempt of ours whose answer was lost; or another node's by now.
        record = await self._ledger.record(outcome.task_id)
        if record is not None and record.outcome is not None and record.outcome.node_id == self._node_id:
            self._report(record.outcome)
        else:
            _log.warning("outcome dropped: the task is no longer this node's", task=outcome.task_id)
