"""The durable ledger of accepted work: what it promises, whatever stores it.

The ledger holds work, not its order: slack order lives in the scheduler core. Delivery is at least once, so execution
is idempotent by task id. Only the scheduler calls the "scheduler side"; only node agents call the "node side".
All methods are coroutines, bounded by the ledger's operation timeout, and raise `LedgerUnavailable` when the store
cannot be reached within it (after bounded retries).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2

#: Events of a job that are kept, the newest.
MAX_JOB_EVENTS = 1000


class LedgerUnavailable(RuntimeError):
    """The store cannot be reached. The message names its URL without credentials."""


class StaleToken(RuntimeError):
    """A newer scheduler has taken over; the caller's fencing token is too old."""


class TaskState(StrEnum):
    """Where a task is."""

    WAITING = "waiting"
    ASSIGNED = "assigned"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Delivery:
    """A task read from a stream.

    `entry_id` names it for acknowledgement; `redelivered`: read before, not acknowledged.
    """

    entry_id: str
    item: work_pb2.WorkItem
    redelivered: bool = False


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """State of one task. `outcome` is set when it is done and its result has not expired."""

    state: TaskState
    node_id: str = ""
    outcome: work_pb2.WorkOutcome | None = None


def may_come_again(outcome: work_pb2.WorkOutcome) -> bool:
    """Whether a task that ended so is accepted anew when it is submitted again."""
    return outcome.inference.finish_reason == types_pb2.FINISH_REASON_CANCELLED


class Ledger(Protocol):
    """Accepted work, files and jobs."""

    # ------------------------------------------------------------- life cycle

    async def ping(self) -> None:
        """Return when the store answers."""
        ...

    async def close(self) -> None:
        """Release connections; idempotent."""
        ...

    # ------------------------------------------------------------- scheduler side: work

    async def acquire_leadership(self) -> int:
        """Take over as the scheduler. Atomically raises and returns the fencing token, > 0."""
        ...

    async def submit(self, item: work_pb2.WorkItem) -> TaskRecord | None:
        """Accept a task: atomically add it to the global stream and set its state to WAITING.

        Returns None when accepted now; the existing record when the task id is known already (nothing is added). A
        request that was cancelled counts as not known: who asks again wants it.
        """
        ...

    async def read_global(self, *, count: int, block_s: float) -> list[Delivery]:
        """Read accepted tasks, first those delivered before and never moved, then new ones; blocks up to `block_s`.

        An empty list is not a promise that `block_s` has passed.
        """
        ...

    def read_global_again(self) -> None:
        """Let the next `read_global` begin again with what was delivered and never moved.

        A predecessor that does not know yet that it is deposed may have read, after us, what nobody else would see.
        """
        ...

    async def assign(self, item: work_pb2.WorkItem, node_id: str, *, entry_id: str | None, token: int) -> bool:
        """Move a task to a node.

        Atomically: add it to the node's stream, remove the task's entry from the global stream (found by the task's
        own state; `entry_id` is removed too), set state ASSIGNED. A task without a state (a micro-batch) is accepted
        by its assignment. True also when this node holds it already. False, and nothing changes, when the task is
        DONE or another node holds it (take it back first). Raises StaleToken when a newer token exists.
        """
        ...

    async def close_task(self, outcome: work_pb2.WorkOutcome, *, entry_id: str | None, forget: bool = False) -> None:
        """End a task no node holds (rejected, cancelled while waiting): state DONE, global entry removed.

        `forget`: leave no state, so that the same id may be submitted again (refused for now, not for good).
        Idempotent. Nothing changes when the task is DONE already or a node holds it.
        """
        ...

    async def unfinished(self, node_id: str) -> list[work_pb2.WorkItem]:
        """Tasks assigned to a node and not done, in the order assigned. Does not change anything."""
        ...

    async def take_back(self, node_id: str, *, token: int, keep_training: bool = False) -> list[work_pb2.WorkItem]:
        """Empty a lost node's stream: atomically return its unfinished tasks to the global stream as WAITING.

        keep_training: micro-batches stay; the node that trained them may come back from a checkpoint.
        Returns them in the order they were assigned; they will be read by `read_global`. Raises StaleToken.
        """
        ...

    async def record(self, task_id: str) -> TaskRecord | None:
        """State of a task; None when unknown or expired."""
        ...

    async def node_ids(self) -> list[str]:
        """Nodes that got work since they were last taken back, sorted."""
        ...

    # ------------------------------------------------------------- node side

    async def read_node(self, node_id: str, *, count: int, block_s: float) -> list[Delivery]:
        """Read the node's tasks: at the first call those delivered before and unfinished, then new ones.

        After a failed or cancelled read, what it may have delivered comes again. A task that comes twice is run once;
        the newer `entry_id` is the one to finish with. Blocks up to `block_s`; an empty list promises nothing.
        """
        ...

    async def finish(self, node_id: str, entry_id: str, outcome: work_pb2.WorkOutcome) -> bool:
        """Atomically: state DONE with the outcome (kept `result_ttl_s`), acknowledge and remove the entry.

        False when the task was done already or is no longer this node's (the outcome is then dropped).
        """
        ...

    async def newest_token(self) -> int:
        """Newest fencing token, 0 before the first scheduler."""
        ...

    # ------------------------------------------------------------- files and jobs

    async def put_file(self, record: work_pb2.FileRecord, examples: list[work_pb2.TrainingExample]) -> None:
        """Append examples to a file and store its record.

        Called once per batch of an upload; the last record stays.
        """
        ...

    async def delete_file(self, file_id: str) -> None:
        """Remove a file and its examples: an upload that failed. Unknown files are no error."""
        ...

    async def get_file(self, file_id: str) -> work_pb2.FileRecord | None:
        """The record, its `num_examples` being what is stored now; None when unknown."""
        ...

    async def read_examples(self, file_id: str, positions: Sequence[int]) -> list[work_pb2.TrainingExample]:
        """Examples at these positions (from 0), in the order asked; positions past the end are left out."""
        ...

    async def append_feedback(self, file_id: str, example: work_pb2.TrainingExample, request_id: str) -> int:
        """Append one example to a file that has no end; returns its position from 1.

        Idempotent by a non-empty request_id.
        """
        ...

    async def put_job(self, record: work_pb2.JobRecord) -> work_pb2.JobRecord:
        """Create or overwrite a job.

        With a request_id that made another job before, that job is returned and nothing changes.
        """
        ...

    async def get_job(self, job_id: str) -> work_pb2.JobRecord | None:
        """The job; None when unknown."""
        ...

    async def list_jobs(self) -> list[work_pb2.JobRecord]:
        """Every stored job, oldest first (bounded by the retention of jobs)."""
        ...

    async def newest_jobs(self, limit: int) -> list[work_pb2.JobRecord]:
        """The newest stored jobs, at most `limit` > 0, newest first. Reads no more than these."""
        ...

    async def append_job_events(self, job_id: str, events: Sequence[types_pb2.JobEvent]) -> None:
        """Append to a job's history; the newest MAX_JOB_EVENTS are kept. A retry may store an event twice."""
        ...

    async def read_job_events(self, job_id: str) -> list[types_pb2.JobEvent]:
        """The kept history, oldest first."""
        ...
