"""The ledger in this process's memory: the same promises except durability. For tests and single-process trials."""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.ledger.types import MAX_JOB_EVENTS, Delivery, StaleToken, TaskRecord, TaskState, may_come_again
from services.runtime.clock import Clock, SystemClock

_ENDED = frozenset({types_pb2.JOB_STATUS_SUCCEEDED, types_pb2.JOB_STATUS_FAILED, types_pb2.JOB_STATUS_CANCELLED})


@dataclass(slots=True)
class _Stream:
    """Entries in order; `delivered` holds those read and not removed."""

    entries: dict[int, bytes] = field(default_factory=dict)
    delivered: set[int] = field(default_factory=set)
    last_entry: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, item: bytes) -> int:
        self.last_entry += 1
        self.entries[self.last_entry] = item
        self.changed.set()
        return self.last_entry

    def remove(self, entry: int) -> bytes | None:
        self.delivered.discard(entry)
        return self.entries.pop(entry, None)

    def pending(self, after: int, count: int) -> list[tuple[int, bytes]]:
        return [(entry, self.entries[entry]) for entry in sorted(self.delivered) if entry > after][:count]

    def take_new(self, count: int) -> list[tuple[int, bytes]]:
        rows = [(entry, item) for entry, item in self.entries.items() if entry not in self.delivered][:count]
        self.delivered.update(entry for entry, _ in rows)
        if not rows:
            self.changed.clear()
        return rows


@dataclass(slots=True)
class _Task:
    state: TaskState
    node_id: str = ""
    entry: int = 0
    outcome: bytes | None = None
    expires_s: float = float("inf")
    may_come_again: bool = False


@dataclass(slots=True)
class _Job:
    record: bytes
    expires_s: float = float("inf")


@dataclass(slots=True)
class MemoryStore:
    """What survives a handle: shared by every ledger opened under one name."""

    clock: Clock = field(default_factory=SystemClock)
    token: int = 0
    global_stream: _Stream = field(default_factory=_Stream)
    node_streams: dict[str, _Stream] = field(default_factory=dict)
    nodes: set[str] = field(default_factory=set)
    tasks: dict[str, _Task] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    examples: dict[str, list[bytes]] = field(default_factory=dict)
    feedback: dict[tuple[str, str], int] = field(default_factory=dict)
    jobs: dict[str, _Job] = field(default_factory=dict)
    job_requests: dict[str, str] = field(default_factory=dict)
    job_events: dict[str, deque[bytes]] = field(default_factory=dict)

    def task(self, task_id: str) -> _Task | None:
        """The task unless its result has expired."""
        task = self.tasks.get(task_id)
        if task is not None and task.expires_s <= self.clock.monotonic_s():
            del self.tasks[task_id]
            return None
        return task

    def job(self, job_id: str) -> _Job | None:
        """The job unless it has expired."""
        job = self.jobs.get(job_id)
        if job is not None and job.expires_s <= self.clock.monotonic_s():
            del self.jobs[job_id]
            self.job_events.pop(job_id, None)
            return None
        return job

    def node_stream(self, node_id: str) -> _Stream:
        """The node's stream, made when first named."""
        return self.node_streams.setdefault(node_id, _Stream())


_STORES: dict[str, MemoryStore] = {}


def shared_store(name: str) -> MemoryStore:
    """The process's store of this name."""
    return _STORES.setdefault(name, MemoryStore())


class MemoryLedger:
    """See `services.ledger.types.Ledger`. One event loop."""

    def __init__(self, store: MemoryStore, *, result_ttl_s: float, retention_s: float) -> None:
        self.name = "memory"
        self._store = store
        self._result_ttl_s = result_ttl_s
        self._retention_s = retention_s
        #: Last entry seen while going through what was delivered before; None: past that.
        self._cursors: dict[str, int | None] = {}

    async def ping(self) -> None:
        """Return at once."""

    async def close(self) -> None:
        """Nothing to release."""

    # ------------------------------------------------------------- scheduler side

    async def acquire_leadership(self) -> int:
        """Take over as the scheduler."""
        self._store.token += 1
        return self._store.token

    async def submit(self, item: work_pb2.WorkItem) -> TaskRecord | None:
        """Accept a task."""
        known = self._store.task(item.task_id)
        if known is not None and not known.may_come_again:
            return _task_record(known)
        entry = self._store.global_stream.add(item.SerializeToString())
        self._store.tasks[item.task_id] = _Task(TaskState.WAITING, entry=entry)
        return None

    async def read_global(self, *, count: int, block_s: float) -> list[Delivery]:
        """Read accepted tasks."""
        return await self._read("", self._store.global_stream, count, block_s)

    def read_global_again(self) -> None:
        """Begin again with what was delivered and never moved."""
        self._cursors.pop("", None)

    async def assign(self, item: work_pb2.WorkItem, node_id: str, *, entry_id: str | None, token: int) -> bool:
        """Move a task to a node."""
        self._check_token(token)
        task = self._store.task(item.task_id)
        if task is not None and task.state is not TaskState.WAITING:
            return task.state is TaskState.ASSIGNED and task.node_id == node_id
        if task is not None:
            self._store.global_stream.remove(task.entry)
        if entry_id is not None:
            self._store.global_stream.remove(int(entry_id))
        entry = self._store.node_stream(node_id).add(item.SerializeToString())
        self._store.tasks[item.task_id] = _Task(TaskState.ASSIGNED, node_id, entry)
        self._store.nodes.add(node_id)
        return True

    async def close_task(self, outcome: work_pb2.WorkOutcome, *, entry_id: str | None, forget: bool = False) -> None:
        """End a task no node holds."""
        task = self._store.task(outcome.task_id)
        if task is not None and task.state is TaskState.ASSIGNED:
            return
        if task is not None and task.state is TaskState.WAITING:
            self._store.global_stream.remove(task.entry)
        if entry_id is not None:
            self._store.global_stream.remove(int(entry_id))
        if task is not None and task.state is TaskState.DONE:
            return
        if forget:
            self._store.tasks.pop(outcome.task_id, None)
        else:
            self._store.tasks[outcome.task_id] = self._done("", outcome)

    async def unfinished(self, node_id: str) -> list[work_pb2.WorkItem]:
        """Tasks assigned to a node and not done."""
        return [work_pb2.WorkItem.FromString(item) for item in self._store.node_stream(node_id).entries.values()]

    async def take_back(self, node_id: str, *, token: int, keep_training: bool = False) -> list[work_pb2.WorkItem]:
        """Return a lost node's tasks to the global stream."""
        self._check_token(token)
        stream = self._store.node_stream(node_id)
        taken = []
        for entry, stored in list(stream.entries.items()):
            item = work_pb2.WorkItem.FromString(stored)
            if keep_training and item.HasField("training"):
                continue
            stream.remove(entry)
            task = self._store.task(item.task_id)
            if task is not None and (task.state, task.node_id, task.entry) == (TaskState.ASSIGNED, node_id, entry):
                again = self._store.global_stream.add(item.SerializeToString())
                self._store.tasks[item.task_id] = _Task(TaskState.WAITING, entry=again)
                taken.append(item)
        if not stream.entries:
            self._store.nodes.discard(node_id)
        return taken

    async def record(self, task_id: str) -> TaskRecord | None:
        """State of a task."""
        task = self._store.task(task_id)
        return None if task is None else _task_record(task)

    async def node_ids(self) -> list[str]:
        """Nodes that got work."""
        return sorted(self._store.nodes)

    # ------------------------------------------------------------- node side

    async def read_node(self, node_id: str, *, count: int, block_s: float) -> list[Delivery]:
        """Read the node's tasks."""
        return await self._read(node_id, self._store.node_stream(node_id), count, block_s)

    async def finish(self, node_id: str, entry_id: str, outcome: work_pb2.WorkOutcome) -> bool:
        """End a task of this node."""
        entry = int(entry_id)
        self._store.node_stream(node_id).remove(entry)
        task = self._store.task(outcome.task_id)
        if task is None or (task.state, task.node_id, task.entry) != (TaskState.ASSIGNED, node_id, entry):
            return False
        self._store.tasks[outcome.task_id] = self._done(node_id, outcome)
        return True

    async def newest_token(self) -> int:
        """Newest fencing token."""
        return self._store.token

    # ------------------------------------------------------------- files and jobs

    async def put_file(self, record: work_pb2.FileRecord, examples: list[work_pb2.TrainingExample]) -> None:
        """Append examples to a file and store its record."""
        stored = self._store.examples.setdefault(record.file_id, [])
        stored += [example.SerializeToString() for example in examples]
        self._store.files[record.file_id] = record.SerializeToString()

    async def delete_file(self, file_id: str) -> None:
        """Remove a file and its examples."""
        self._store.files.pop(file_id, None)
        self._store.examples.pop(file_id, None)

    async def get_file(self, file_id: str) -> work_pb2.FileRecord | None:
        """The record of a file."""
        stored = self._store.files.get(file_id)
        if stored is None:
            return None
        record = work_pb2.FileRecord.FromString(stored)
        record.num_examples = len(self._store.examples.get(file_id, ()))
        return record

    async def read_examples(self, file_id: str, positions: Sequence[int]) -> list[work_pb2.TrainingExample]:
        """Examples at these positions."""
        stored = self._store.examples.get(file_id, [])
        return [work_pb2.TrainingExample.FromString(stored[at]) for at in positions if at < len(stored)]

    async def append_feedback(self, file_id: str, example: work_pb2.TrainingExample, request_id: str) -> int:
        """Append one example to a file that has no end."""
        known = self._store.feedback.get((file_id, request_id)) if request_id else None
        if known is not None:
            return known
        stored = self._store.examples.setdefault(file_id, [])
        stored.append(example.SerializeToString())
        if request_id:
            self._store.feedback[file_id, request_id] = len(stored)
        return len(stored)

    async def put_job(self, record: work_pb2.JobRecord) -> work_pb2.JobRecord:
        """Create or overwrite a job."""
        job_id = record.job.job_id
        if record.request_id:
            earlier = self._store.job(self._store.job_requests.get(record.request_id, job_id))
            known = None if earlier is None else work_pb2.JobRecord.FromString(earlier.record)
            if known is not None and known.job.job_id != job_id:
                return known
            self._store.job_requests[record.request_id] = job_id
        expires_s = float("inf")
        if record.job.status in _ENDED:
            expires_s = self._store.clock.monotonic_s() + self._retention_s
        self._store.jobs[job_id] = _Job(record.SerializeToString(), expires_s)
        return record

    async def get_job(self, job_id: str) -> work_pb2.JobRecord | None:
        """A job."""
        job = self._store.job(job_id)
        return None if job is None else work_pb2.JobRecord.FromString(job.record)

    async def list_jobs(self) -> list[work_pb2.JobRecord]:
        """Every stored job."""
        jobs = [job for job_id in list(self._store.jobs) if (job := self._store.job(job_id)) is not None]
        records = [work_pb2.JobRecord.FromString(job.record) for job in jobs]
        return sorted(records, key=lambda record: (record.job.created_unix_s, record.job.job_id))

    async def newest_jobs(self, limit: int) -> list[work_pb2.JobRecord]:
        """The newest stored jobs."""
        return (await self.list_jobs())[: -limit - 1 : -1]

    async def append_job_events(self, job_id: str, events: Sequence[types_pb2.JobEvent]) -> None:
        """Append to a job's history."""
        history = self._store.job_events.setdefault(job_id, deque(maxlen=MAX_JOB_EVENTS))
        history.extend(event.SerializeToString() for event in events)

    async def read_job_events(self, job_id: str) -> list[types_pb2.JobEvent]:
        """The kept history."""
        return [types_pb2.JobEvent.FromString(row) for row in self._store.job_events.get(job_id, ())]

    # ------------------------------------------------------------- helpers

    async def _read(self, reader: str, stream: _Stream, count: int, block_s: float) -> list[Delivery]:
        cursor = self._cursors.get(reader, 0)
        if cursor is not None:
            rows = stream.pending(cursor, count)
            if rows:
                self._cursors[reader] = rows[-1][0]
                return _deliveries(rows, redelivered=True)
            self._cursors[reader] = None
        rows = stream.take_new(count)
        if not rows and block_s > 0:
            try:
                async with asyncio.timeout(block_s):
                    await stream.changed.wait()
            except TimeoutError:
                return []
            rows = stream.take_new(count)
        else:
            await asyncio.sleep(0)  # a caller in a loop must not starve the others
        return _deliveries(rows, redelivered=False)

    def _done(self, node_id: str, outcome: work_pb2.WorkOutcome) -> _Task:
        expires_s = self._store.clock.monotonic_s() + self._result_ttl_s
        data = outcome.SerializeToString()
        again = may_come_again(outcome)
        return _Task(TaskState.DONE, node_id, outcome=data, expires_s=expires_s, may_come_again=again)

    def _check_token(self, token: int) -> None:
        if token < self._store.token:
            raise StaleToken(f"fencing token {token} is too old: another scheduler has taken over")


def _deliveries(rows: list[tuple[int, bytes]], *, redelivered: bool) -> list[Delivery]:
    return [Delivery(str(entry), work_pb2.WorkItem.FromString(item), redelivered) for entry, item in rows]


def _task_record(task: _Task) -> TaskRecord:
    outcome = None if task.outcome is None else work_pb2.WorkOutcome.FromString(task.outcome)
    return TaskRecord(task.state, task.node_id, outcome)
