"""Checkpoints of the nodes, as the scheduler knows them: listed, asked for, and told to their jobs."""

import asyncio
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.scheduler.job_state import JobState
from services.scheduler.lineage import CHECKPOINT_PREFIX, Lineage
from services.scheduler.refusals import unavailable

_log = structlog.get_logger()

Action = Literal["save", "restore", "export"]

#: (jobs, level, message): something their owners should know.
Announce = Callable[[Iterable[str], str, str], None]


#: Lost nodes whose newest checkpoint is remembered.
_MAX_LOST = 64
#: Why a checkpoint was saved that holds nothing newly trained.
_COPIES = frozenset({"rollback", "publish"})


class CheckpointDesk:
    """Asks nodes and waits for their reports. `send` reaches a connected node; set it and `announce` before use."""

    def __init__(self, *, timeout_s: float = 120.0) -> None:
        self._timeout_s = timeout_s
        self.send: Callable[[str, pb.NodeSessionResponse], bool] = lambda node_id, message: False
        self.announce: Announce = lambda job_ids, level, message: None
        #: Told of every checkpoint a node saved of what it has trained, with the node.
        self.on_saved: Callable[[str, types_pb2.Checkpoint], None] = lambda node_id, checkpoint: None
        #: Checkpoints of connected nodes that keep some, the newest first.
        self._held: dict[str, list[types_pb2.Checkpoint]] = {}
        self._hellos: dict[str, pb.NodeHello] = {}
        #: Newest checkpoint of nodes that were lost, and their model.
        self._lost: dict[str, tuple[str, str]] = {}
        self.lineage = Lineage()
        #: Node and answer by request.
        self._waiting: dict[str, tuple[str, asyncio.Future[Any]]] = {}

    # ------------------------------------------------------------- told by the nodes

    def joined(self, hello: pb.NodeHello) -> None:
        """A node is here."""
        self._held.pop(hello.node_id, None)
        self._hellos[hello.node_id] = hello
        self.lineage.joined(hello)
        if hello.keeps_checkpoints:
            self._held[hello.node_id] = list(hello.checkpoints)
        if hello.restore_note:
            _log.error("node started from an older checkpoint", node=hello.node_id, note=hello.restore_note)
            self.announce((), "error", f"{hello.node_id}: {hello.restore_note}")

    def left(self, node_id: str) -> None:
        """A node is gone, and with it the answers it owes."""
        held = self._held.pop(node_id, None)
        if held:
            self._lost[node_id] = (held[0].checkpoint_id, self._hellos[node_id].model)
            self._lost = dict(list(self._lost.items())[-_MAX_LOST:])
        self._hellos.pop(node_id, None)
        for asked_id, future in self._waiting.values():
            if asked_id == node_id and not future.done():
                future.set_exception(LemixError(ErrorCode.NODE_LOST, f"node {node_id} was lost"))

    def reported(self, node_id: str, report: pb.CheckpointReport) -> None:
        """A node saved, restored or exported a checkpoint, or could not."""
        if node_id in self._held:
            self._held[node_id] = list(report.held)
        self.lineage.saved(node_id, report)
        self._answer(report.request_id, report)
        if report.HasField("error"):
            self.announce((), "warn", f"{node_id} could not finish with a checkpoint: {report.error.message}")
        elif not report.path:
            checkpoint = report.checkpoint
            message = f"{node_id} holds checkpoint {checkpoint.checkpoint_id} ({checkpoint.reason})"
            self.announce(checkpoint.trained_microbatches, "info", message)
            if checkpoint.reason not in _COPIES:
                self.on_saved(node_id, checkpoint)

    def evaluated(self, report: pb.EvaluationReport) -> None:
        """A node measured a loss, or could not."""
        self._answer(report.request_id, report)

    def sync_finished(self, node_id: str, finished: pb.SyncFinished) -> None:
        """A node took over a published checkpoint, or could not. Other synchronisations are the core's."""
        self.lineage.finished(node_id, finished)
        self._answer(f"{finished.sync_id}@{node_id}", finished)

    def _answer(self, request_id: str, message: Any) -> None:
        waiting = self._waiting.get(request_id)
        if waiting is not None and not waiting[1].done():
            waiting[1].set_result(message)

    # ------------------------------------------------------------- asked

    def keepers(self) -> list[str]:
        """Connected nodes that keep checkpoints."""
        return sorted(self._held)

    def listed(self, job_id: str = "") -> list[types_pb2.Checkpoint]:
        """Checkpoints of connected nodes, with micro-batches of this job if one is named; the newest first."""
        found = [checkpoint for held in self._held.values() for checkpoint in held]
        wanted = [checkpoint for checkpoint in found if not job_id or job_id in checkpoint.trained_microbatches]
        return sorted(wanted, key=lambda checkpoint: checkpoint.created_unix_s, reverse=True)

    def held_by(self, node_id: str) -> list[types_pb2.Checkpoint]:
        """Checkpoints of a connected node, the newest first."""
        return self._held.get(node_id, [])

    def newest_of_lost(self, node_id: str) -> str:
        """Id of the newest checkpoint of a lost node; empty: none is known."""
        return self._lost.get(node_id, ("", ""))[0]

    def peers_of_lost(self, node_id: str) -> list[str]:
        """Connected nodes that keep checkpoints of the model of a lost node."""
        _, model = self._lost.get(node_id, ("", ""))
        return [keeper for keeper in self.keepers() if self._hellos[keeper].model == model]

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

    def ask_to_save(self, state: JobState) -> None:
        """Ask for checkpoints when nothing else is left to do, or nothing more may be offered before."""
        if state.only_to_save:
            for node_id in sorted(state.microbatches.unsaved_nodes):
                self.tell(node_id, "job_end")
        elif (blocking_id := state.microbatches.node_to_save()) is not None:
            self.tell(blocking_id, "interval")
        for node_id in sorted(state.nodes_to_save_paused()):
            self.tell(node_id, "pause")

    async def ask(self, node_id: str, action: Action, value: str) -> pb.CheckpointReport:
        """Let a node do something and wait for it.

        Raises what the node answers, UNAVAILABLE when it is not connected, DEADLINE_EXCEEDED.
        """
        request_id = uuid.uuid4().hex
        report: pb.CheckpointReport = await self._call(request_id, node_id, _command(request_id, action, value))
        return report

    async def export(self, node_id: str, checkpoint_id: str, job_id: str) -> pb.CheckpointReport:
        """Let a node write a checkpoint's model, or the adapter of a job, as a directory. Raises as `ask`."""
        request_id = uuid.uuid4().hex
        message = _command(request_id, "export", checkpoint_id)
        message.checkpoint.export_job_id = job_id
        report: pb.CheckpointReport = await self._call(request_id, node_id, message)
        return report

    async def _call(self, request_id: str, node_id: str, message: pb.NodeSessionResponse) -> Any:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if request_id in self._waiting:
            raise LemixError(ErrorCode.CONFLICT, f"node {node_id[:100]} is doing so already", retry_after_s=1.0)
        self._waiting[request_id] = (node_id, future)
        try:
            if not self.send(node_id, message):
                raise unavailable(f"node {node_id[:100]} is not connected")
            async with asyncio.timeout(self._timeout_s):
                report = await future
        except TimeoutError as error:
            text = f"node {node_id} did not answer within {self._timeout_s:g} s"
            raise LemixError(ErrorCode.DEADLINE_EXCEEDED, text) from error
        finally:
            del self._waiting[request_id]
        if report.HasField("error"):
            raise LemixError.from_proto(report.error)
        return report

    async def heldout_loss(
        self, node_id: str, examples: Sequence[work_pb2.TrainingExample], adapter_id: str = ""
    ) -> float:
        """Loss of a node's weights, or of an isolated adapter on them, nats per token. Raises as `ask`."""
        request_id = uuid.uuid4().hex
        command = pb.EvaluateCommand(request_id=request_id, examples=examples, adapter_id=adapter_id)
        report = await self._call(request_id, node_id, pb.NodeSessionResponse(evaluate=command))
        return float(report.loss)

    def keep(self, node_id: str, job_id: str, checkpoint_id: str) -> None:
        """Let a node keep this checkpoint for a job, and no other one for it; empty: none. Nobody waits for it."""
        wanted = pb.KeepCheckpoint(job_id=job_id, checkpoint_id=checkpoint_id)
        self.send(node_id, pb.NodeSessionResponse(checkpoint=pb.CheckpointCommand(keep=wanted)))

    async def publish(self, checkpoint_id: str, node_ids: Sequence[str]) -> list[types_pb2.WeightVersion]:
        """Let nodes (none named: all others) take over the weights of a checkpoint; returns their versions.

        Raises NOT_FOUND, and what a node answers: the others have taken it over then.
        """
        owner = self.owner_of(checkpoint_id)
        targets = sorted(set(node_ids) - {owner} if node_ids else self._hellos.keys() - {owner})
        message = pb.ApplyWeights(
            sync_id=CHECKPOINT_PREFIX + checkpoint_id,
            mode=pb.SYNC_MODE_REPLACE,
            source_addresses=[self._hellos[owner].address],
        )
        calls = (
            self._call(f"{message.sync_id}@{target}", target, pb.NodeSessionResponse(apply_weights=message))
            for target in targets
        )
        results = await asyncio.gather(*calls, return_exceptions=True)
        versions = []
        for target, result in zip(targets, results, strict=True):
            if isinstance(result, BaseException):
                raise result
            incarnation = self._hellos[target].incarnation if target in self._hellos else 0
            versions.append(types_pb2.WeightVersion(node_id=target, incarnation=incarnation, step=result.weight_step))
        self.announce((), "info", f"{', '.join(targets) or 'no other node'} took over checkpoint {checkpoint_id}")
        return versions

    async def save(self, node_ids: Iterable[str]) -> list[types_pb2.Checkpoint]:
        """Save on these nodes. Raises CONFLICT when none of them keeps checkpoints, and what `ask` raises."""
        asked = sorted(set(node_ids).intersection(self._held))
        if not asked:
            message = "no connected node that trained this job keeps checkpoints: set its checkpoint_directory"
            raise LemixError(ErrorCode.CONFLICT, message, param="job_id")
        reports = await asyncio.gather(*(self.ask(node_id, "save", "request") for node_id in asked))
        return [report.checkpoint for report in reports]


def _command(request_id: str, action: Action, value: str) -> pb.NodeSessionResponse:
    command = pb.CheckpointCommand(request_id=request_id)
    setattr(command, action, value)
    return pb.NodeSessionResponse(checkpoint=command)
