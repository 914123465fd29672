"""The ledger in Redis 6.2 or newer: streams with consumer groups, every move one script (`services.ledger.scripts`).

Durability is Redis's: with `appendonly yes` and `appendfsync everysec` a crash of the machine may lose the last second
of accepted work; a crash of Redis alone loses nothing; `always` loses nothing at the price of one fsync per change.
"""

import uuid
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import urlsplit

import redis.exceptions

from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.ledger import scripts
from services.ledger.calls import RedisCalls
from services.ledger.connection import RedisChannel, RedisConnector
from services.ledger.types import (
    MAX_JOB_EVENTS,
    Delivery,
    StaleToken,
    TaskRecord,
    TaskState,
    may_come_again,
)

#: Longest single blocking read, seconds; longer waits are cut, so that a dead connection is noticed.
_MAX_BLOCK_S: Final = 5.0

_ENDED: Final = frozenset({types_pb2.JOB_STATUS_SUCCEEDED, types_pb2.JOB_STATUS_FAILED, types_pb2.JOB_STATUS_CANCELLED})


class RedisLedger:
    """See `services.ledger.types.Ledger`. Made by `open_ledger`; one reader per stream and instance."""

    def __init__(self, url: str, *, operation_timeout_s: float, result_ttl_s: float, retention_s: float) -> None:
        self.name = redacted(url)
        self._timeout_s = operation_timeout_s
        self._result_ttl_ms = max(1, round(result_ttl_s * 1e3))
        self._retention_ms = round(retention_s * 1e3)
        self._connector = RedisConnector(url, operation_timeout_s)
        self._channel = RedisChannel(self._connector)
        self._calls = RedisCalls(self._channel, name=self.name, timeout_s=operation_timeout_s)
        #: By stream: a read that waits holds its connection up.
        self._blocking: dict[str, RedisChannel] = {}
        #: Where to read a stream on: an entry id while going through what was delivered before, then ">".
        self._cursors: dict[str, str] = {}

    # ------------------------------------------------------------- life cycle

    async def ping(self) -> None:
        """Return when the store answers."""
        await self._calls.command("PING")

    async def close(self) -> None:
        """Release connections; idempotent."""
        for channel in (self._channel, *self._blocking.values()):
            await channel.close()

    # ------------------------------------------------------------- scheduler side

    async def acquire_leadership(self) -> int:
        """Take over as the scheduler."""
        return int(await self._calls.command("INCR", scripts.TOKEN))

    async def submit(self, item: work_pb2.WorkItem) -> TaskRecord | None:
        """Accept a task."""
        reply = await self._calls.run(
            scripts.SUBMIT, [scripts.task_key(item.task_id), scripts.GLOBAL], [item.SerializeToString(), _op()]
        )
        return None if reply is None else _task_record(reply)

    async def read_global(self, *, count: int, block_s: float) -> list[Delivery]:
        """Read accepted tasks."""
        return await self._read(scripts.GLOBAL, scripts.GLOBAL_GROUP, count, block_s)

    def read_global_again(self) -> None:
        """Begin again with what was delivered and never moved."""
        self._cursors.pop(scripts.GLOBAL, None)

    async def assign(self, item: work_pb2.WorkItem, node_id: str, *, entry_id: str | None, token: int) -> bool:
        """Move a task to a node."""
        reply = await self._calls.run(
            scripts.ASSIGN,
            [scripts.TOKEN, scripts.task_key(item.task_id), scripts.GLOBAL, scripts.node_key(node_id), scripts.NODES],
            [token, item.SerializeToString(), node_id, entry_id or "", scripts.GLOBAL_GROUP],
        )
        self._check_token(reply, token)
        return bool(reply == 1)

    async def close_task(self, outcome: work_pb2.WorkOutcome, *, entry_id: str | None, forget: bool = False) -> None:
        """End a task no node holds."""
        ttl_ms = 0 if forget else self._result_ttl_ms
        await self._calls.run(
            scripts.CLOSE,
            [scripts.task_key(outcome.task_id), scripts.GLOBAL],
            [outcome.SerializeToString(), ttl_ms, entry_id or "", scripts.GLOBAL_GROUP, int(may_come_again(outcome))],
        )

    async def unfinished(self, node_id: str) -> list[work_pb2.WorkItem]:
        """Tasks assigned to a node and not done."""
        return [item for _, item in await self._entries(node_id)]

    async def take_back(self, node_id: str, *, token: int, keep_training: bool = False) -> list[work_pb2.WorkItem]:
        """Return a lost node's tasks to the global stream."""
        taken: list[work_pb2.WorkItem] = []
        while True:
            entries = await self._entries(node_id)
            if keep_training:
                entries = [(entry, item) for entry, item in entries if not item.HasField("training")]
            reply = await self._calls.run(
                scripts.TAKE_BACK,
                [
                    *(scripts.TOKEN, scripts.node_key(node_id), scripts.GLOBAL, scripts.NODES),
                    *(scripts.task_key(item.task_id) for _, item in entries),
                ],
                [token, node_id, scripts.NODE_GROUP, _op(), *(entry for entry, _ in entries)],
            )
            self._check_token(reply, token)
            if not entries:
                return taken
            taken += [entries[position - 1][1] for position in reply]

    async def record(self, task_id: str) -> TaskRecord | None:
        """State of a task."""
        reply = await self._calls.command("HMGET", scripts.task_key(task_id), "state", "node", "outcome")
        return None if reply[0] is None else _task_record(reply)

    async def node_ids(self) -> list[str]:
        """Nodes that got work."""
        members = await self._calls.command("SMEMBERS", scripts.NODES)
        return sorted(member.decode() for member in members)

    # ------------------------------------------------------------- node side

    async def read_node(self, node_id: str, *, count: int, block_s: float) -> list[Delivery]:
        """Read the node's tasks."""
        return await self._read(scripts.node_key(node_id), scripts.NODE_GROUP, count, block_s)

    async def finish(self, node_id: str, entry_id: str, outcome: work_pb2.WorkOutcome) -> bool:
        """End a task of this node."""
        reply = await self._calls.run(
            scripts.FINISH,
            [scripts.task_key(outcome.task_id), scripts.node_key(node_id)],
            [
                *(node_id, entry_id, outcome.SerializeToString(), self._result_ttl_ms, _op(), scripts.NODE_GROUP),
                int(may_come_again(outcome)),
            ],
        )
        return bool(reply == 1)

    async def newest_token(self) -> int:
        """Newest fencing token."""
        return int(await self._calls.command("GET", scripts.TOKEN) or 0)

    # ------------------------------------------------------------- files and jobs

    async def put_file(self, record: work_pb2.FileRecord, examples: list[work_pb2.TrainingExample]) -> None:
        """Append examples to a file and store its record."""
        await self._calls.run(
            scripts.PUT_FILE,
            [scripts.file_key(record.file_id), scripts.examples_key(record.file_id)],
            [
                *(record.SerializeToString(), _op(), self._retention_ms),
                *(example.SerializeToString() for example in examples),
            ],
        )

    async def delete_file(self, file_id: str) -> None:
        """Remove a file and its examples."""
        await self._calls.command("DEL", scripts.file_key(file_id), scripts.examples_key(file_id))

    async def get_file(self, file_id: str) -> work_pb2.FileRecord | None:
        """The record of a file."""
        stored, count = await self._calls.pipeline(
            ("HGET", scripts.file_key(file_id), "record"), ("HLEN", scripts.examples_key(file_id))
        )
        if stored is None:
            return None
        record = work_pb2.FileRecord.FromString(stored)
        record.num_examples = count
        return record

    async def read_examples(self, file_id: str, positions: Sequence[int]) -> list[work_pb2.TrainingExample]:
        """Examples at these positions."""
        if not positions:
            return []
        key = scripts.examples_key(file_id)
        rows, *_ = await self._calls.pipeline(
            ("HMGET", key, *positions),
            ("PEXPIRE", key, self._retention_ms),
            ("PEXPIRE", scripts.file_key(file_id), self._retention_ms),
        )
        return [work_pb2.TrainingExample.FromString(row) for row in rows if row is not None]

    async def append_feedback(self, file_id: str, example: work_pb2.TrainingExample, request_id: str) -> int:
        """Append one example to a file that has no end."""
        # Without a request id only this call's own retries must find the example again.
        known_ms = self._retention_ms if request_id else round(2e3 * self._timeout_s)
        keys = [
            scripts.file_key(file_id),
            scripts.examples_key(file_id),
            scripts.feedback_key(file_id, request_id or _op()),
        ]
        values = [example.SerializeToString(), self._retention_ms, known_ms]
        return int(await self._calls.run(scripts.APPEND_FEEDBACK, keys, values))

    async def put_job(self, record: work_pb2.JobRecord) -> work_pb2.JobRecord:
        """Create or overwrite a job."""
        job_id = record.job.job_id
        keys = [scripts.JOBS, scripts.job_key(job_id)]
        if record.request_id:
            keys.append(scripts.job_request_key(record.request_id))
        retention_ms = self._retention_ms if record.job.status in _ENDED else 0
        values = [job_id, record.SerializeToString(), record.job.created_unix_s, retention_ms]
        known = await self._calls.run(scripts.PUT_JOB, keys, values)
        if known is None:
            return record
        earlier = await self.get_job(known.decode())
        # Job and request expire together; between the two calls is the only moment to find one without the other.
        return earlier if earlier is not None else await self.put_job(record)

    async def get_job(self, job_id: str) -> work_pb2.JobRecord | None:
        """A job."""
        stored = await self._calls.command("GET", scripts.job_key(job_id))
        return None if stored is None else work_pb2.JobRecord.FromString(stored)

    async def list_jobs(self) -> list[work_pb2.JobRecord]:
        """Every stored job."""
        return await self._read_jobs(await self._calls.command("ZRANGE", scripts.JOBS, 0, -1))

    async def newest_jobs(self, limit: int) -> list[work_pb2.JobRecord]:
        """The newest stored jobs."""
        while True:
            job_ids = await self._calls.command("ZREVRANGE", scripts.JOBS, 0, limit - 1)
            records = await self._read_jobs(job_ids)
            if len(records) == len(job_ids):
                return records
            # Expired ones took places, and have left the index now.

    async def _read_jobs(self, job_ids: Sequence[bytes]) -> list[work_pb2.JobRecord]:
        """Those that are stored; the others leave the index."""
        if not job_ids:
            return []
        rows = await self._calls.command("MGET", *(scripts.job_key(job_id.decode()) for job_id in job_ids))
        expired = [job_id for job_id, row in zip(job_ids, rows, strict=True) if row is None]
        if expired:  # ids are never used again, so what is gone stays gone
            await self._calls.command("ZREM", scripts.JOBS, *expired)
        return [work_pb2.JobRecord.FromString(row) for row in rows if row is not None]

    async def append_job_events(self, job_id: str, events: Sequence[types_pb2.JobEvent]) -> None:
        """Append to a job's history."""
        if not events:
            return
        key = scripts.job_events_key(job_id)
        await self._calls.pipeline(
            ("RPUSH", key, *(event.SerializeToString() for event in events)),
            ("LTRIM", key, -MAX_JOB_EVENTS, -1),
            ("PEXPIRE", key, self._retention_ms),
        )

    async def read_job_events(self, job_id: str) -> list[types_pb2.JobEvent]:
        """The kept history."""
        rows = await self._calls.command("LRANGE", scripts.job_events_key(job_id), 0, -1)
        return [types_pb2.JobEvent.FromString(row) for row in rows]

    # ------------------------------------------------------------- reading streams

    async def _entries(self, node_id: str) -> list[tuple[str, work_pb2.WorkItem]]:
        rows = await self._calls.command("XRANGE", scripts.node_key(node_id), "-", "+")
        return [(entry.decode(), work_pb2.WorkItem.FromString(_item(fields))) for entry, fields in rows]

    async def _read(self, stream: str, group: str, count: int, block_s: float) -> list[Delivery]:
        block_s = min(block_s, _MAX_BLOCK_S)
        return await self._calls.call(lambda: self._read_once(stream, group, count, block_s), extra_s=max(block_s, 0.0))

    async def _read_once(self, stream: str, group: str, count: int, block_s: float) -> list[Delivery]:
        # Whatever interrupts a read, the server may have delivered: start over with what is pending.
        cursor = self._cursors.pop(stream, "0")
        if cursor == "0":
            await self._make_group(stream, group)
        if cursor != ">":
            rows = await self._read_group(stream, group, cursor, count, 0.0)
            if rows:
                self._cursors[stream] = rows[-1][0].decode()
                return await self._deliveries(stream, group, rows, redelivered=True)
        rows = await self._read_group(stream, group, ">", count, block_s)
        self._cursors[stream] = ">"
        return await self._deliveries(stream, group, rows, redelivered=False)

    async def _make_group(self, stream: str, group: str) -> None:
        try:
            await self._channel.command("XGROUP", "CREATE", stream, group, "0", "MKSTREAM")
        except redis.exceptions.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise

    async def _read_group(self, stream: str, group: str, cursor: str, count: int, block_s: float) -> list[Any]:
        # One consumer per group: whoever is the scheduler, or the node, inherits what its predecessor left pending.
        block = ("BLOCK", max(1, round(block_s * 1e3))) if block_s > 0 else ()
        channel = self._blocking.get(stream)
        if channel is None:
            channel = self._blocking[stream] = RedisChannel(self._connector)
        try:
            reply = await channel.command(
                "XREADGROUP", "GROUP", group, group, "COUNT", count, *block, "STREAMS", stream, cursor
            )
        except BaseException:
            channel.drop()  # the server may still be waiting, and whatever came next would wait behind
            raise
        return list(reply[0][1]) if reply else []

    async def _deliveries(self, stream: str, group: str, rows: list[Any], *, redelivered: bool) -> list[Delivery]:
        gone = [entry for entry, fields in rows if not fields]
        if gone:
            await self._channel.command("XACK", stream, group, *gone)
        return [
            Delivery(entry.decode(), work_pb2.WorkItem.FromString(_item(fields)), redelivered)
            for entry, fields in rows
            if fields
        ]

    def _check_token(self, reply: Any, token: int) -> None:
        if reply == -1:
            raise StaleToken(f"fencing token {token} is too old: another scheduler has taken over")


def redacted(url: str) -> str:
    """The URL without user and password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _task_record(fields: Sequence[bytes | None]) -> TaskRecord:
    state, node_id, outcome = fields
    return TaskRecord(
        TaskState((state or b"").decode()),
        (node_id or b"").decode(),
        None if outcome is None else work_pb2.WorkOutcome.FromString(outcome),
    )


def _item(fields: Sequence[bytes]) -> bytes:
    """Of a stream entry's only field."""
    return fields[1]


def _op() -> str:
    return uuid.uuid4().hex
