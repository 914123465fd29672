"""Checkpoints of the nodes, as the scheduler knows them: listed, asked for, and told to their jobs."""

import asyncio
import uuid
from collections.abc import Callable, Iterable
from typing import Literal

import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.v1 import types_pb2

_log = structlog.get_logger()

Action = Literal["save", "restore", "export"]
#: (jobs, level, message): something their owners should know.
Announce = Callable[[Iterable[str], str, str], None]


class CheckpointDesk:
    """Asks nodes and waits for their reports. `send` reaches a connected node; set it and `announce` before use."""

    def __init__(self, *, timeout_s: float = 120.0) -> None:
        self._timeout_s = timeout_s
        self.send: Callable[[str, pb.NodeSessionResponse], bool] = lambda node_id, message: False
        self.announce: Announce = lambda job_ids, level, message: None
        #: Checkpoints of connected nodes that keep some, the newest first.
        self._held: dict[str, list[types_pb2.Checkpoint]] = {}
        self._waiting: dict[str, tuple[str, asyncio.Future[pb.CheckpointReport]]] = {}

    # ------------------------------------------------------------- told by the nodes

    def joined(self, hello: pb.NodeHello) -> None:
        """A node is here."""
        self._held.pop(hello.node_id, None)
        if hello.keeps_checkpoints:
            self._held[hello.node_id] = list(hello.checkpoints)
        if hello.restore_note:
            _log.error("node started from an older checkpoint", node=hello.node_id, note=hello.restore_note)
            self.announce((), "error", f"{hello.node_id}: {hello.restore_note}")

    def left(self, node_id: str) -> None:
        """A node is gone, and with it the answers it owes."""
        self._held.pop(node_id, None)
        for asked_id, future in self._waiting.values():
            if asked_id == node_id and not future.done():
                future.set_exception(LemixError(ErrorCode.NODE_LOST, f"node {node_id} was lost"))

    def reported(self, node_id: str, report: pb.CheckpointReport) -> None:
        """A node saved, restored or exported a checkpoint, or could not."""
        if node_id in self._held:
            self._held[node_id] = list(report.held)
        waiting = self._waiting.get(report.request_id)
        if waiting is not None and not waiting[1].done():
            waiting[1].set_result(report)
        if report.HasField("error"):
            self.announce((), "warn", f"{node_id} could not finish with a checkpoint: {report.error.message}")
        elif not report.path:
            checkpoint = report.checkpoint
            message = f"{node_id} holds checkpoint {checkpoint.checkpoint_id} ({checkpoint.reason})"
            self.announce(checkpoint.trained_microbatches, "info", message)

    # ------------------------------------------------------------- asked

    def keepers(self) -> list[str]:
        """Connected nodes that keep checkpoints."""
        return sorted(self._held)

    def listed(self, job_id: str = "") -> list[types_pb2.Checkpoint]:
        """Checkpoints of connected nodes, with micro-batches of this job if one is named; the newest first."""
        found = [checkpoint for held in self._held.values() for checkpoint in held]
        wanted = [checkpoint for checkpoint in found if not job_id or job_id in checkpoint.trained_microbatches]
        return sorted(wanted, key=lambda checkpoint: checkpoint.created_unix_s, reverse=True)

    def owner_of(self, checkpoint_id: str) -> str:
        """Connected node that holds this checkpoint. Raises NOT_FOUND."""
        for node_id, held in self._held.items():
            if any(checkpoint.checkpoint_id == checkpoint_id for checkpoint in held):
                return node_id
        message = f"no connected node holds checkpoint {checkpoint_id[:200]!r}"
        raise LemixError(ErrorCode.NOT_FOUND, message, param="checkpoint_id")

    def tell(self, node_id: str, reason: str) -> None:
        """Let a node save a checkpoint; nobody waits for it."""
        self.send(node_id, _command("", "save", reason))

    async def ask(self, node_id: str, action: Action, value: str) -> pb.CheckpointReport:
        """Let a node do something and wait for it.

        Raises what the node answers, UNAVAILABLE when it is not connected, DEADLINE_EXCEEDED.
        """
        request_id = uuid.uuid4().hex
        future: asyncio.Future[pb.CheckpointReport] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = (node_id, future)
        try:
            if not self.send(node_id, _command(request_id, action, value)):
                raise LemixError(ErrorCode.UNAVAILABLE, f"node {node_id[:100]} is not connected", retry_after_s=1.0)
            async with asyncio.timeout(self._timeout_s):
                report = await future
        except TimeoutError as error:
            message = f"node {node_id} did not {action} within {self._timeout_s:g} s"
            raise LemixError(ErrorCode.DEADLINE_EXCEEDED, message) from error
        finally:
            del self._waiting[request_id]
        if report.HasField("error"):
            raise LemixError.from_proto(report.error)
        return report

    async def save(self, node_ids: Iterable[str]) -> list[types_pb2.Checkpoint]:
        """Save on these nodes. Raises CONFLICT when none of them keeps checkpoints, and what `ask` raises."""
        asked = sorted(set(node_ids).intersection(self._held))
        if not asked:
            message = "no connected node that trained this job keeps checkpoints: set its checkpoint_directory"
            raise LemixError(ErrorCode.CONFLICT, message, param="job_id")
        reports = await asyncio.gather(*(self.ask(node_id, "save", "request") for node_id in asked))
        return [report.checkpoint for report in reports]


def _command(request_id: str, action: Action, value: str) -> pb.NodeSessionResponse:
    command = pb.CheckpointCommand(request_id=request_id, **{action: value})
    return pb.NodeSessionResponse(checkpoint=command)
