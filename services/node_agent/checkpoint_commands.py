"""What the scheduler asks of a node's checkpoints: to save, restore, export or keep one."""

import asyncio
from pathlib import Path

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as scheduler_pb2
from services.node_agent.checkpoint_manifest import CorruptedCheckpoint, Manifest
from services.node_agent.checkpoint_report import CheckpointReports, disk_error
from services.node_agent.checkpoint_store import CheckpointStore
from services.node_agent.checkpoints import Checkpointer

#: Commands under way at once.
_MAX_COMMANDS = 64


class CheckpointCommands:
    """Performs commands beside each other; the scheduler is told of the end of each, but for one that was kept."""

    def __init__(self, checkpoints: Checkpointer, store: CheckpointStore, reports: CheckpointReports) -> None:
        self._checkpoints = checkpoints
        self._store = store
        self._reports = reports
        self._exporting = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, command: scheduler_pb2.CheckpointCommand) -> None:
        """Begin what the scheduler asks for; it is told of the end."""
        if len(self._tasks) >= _MAX_COMMANDS:
            error = LemixError(ErrorCode.OVERLOADED, "too many checkpoint requests are under way on this node")
            self._reports.failure(command.request_id, error)
            return
        task = asyncio.create_task(self._perform(command))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _perform(self, command: scheduler_pb2.CheckpointCommand) -> None:
        request_id = command.request_id
        try:
            match command.WhichOneof("action"):
                case "save":
                    await self._checkpoints.save_or_owe(command.save, request_id)
                case "restore":
                    await self._checkpoints.restore(command.restore, request_id)
                case "export":
                    path, manifest = await self._export(command.export, command.export_job_id)
                    self._reports.success(request_id, manifest, path=str(path))
                case "keep":
                    await self._checkpoints.keep(command.keep)
                case other:
                    raise LemixError(ErrorCode.UNSUPPORTED, f"unknown checkpoint command {other}")
        except LemixError as error:
            self._reports.failure(request_id, error)

    async def _export(self, checkpoint_id: str, job_id: str) -> tuple[Path, Manifest]:
        try:
            async with self._exporting:
                return await asyncio.to_thread(self._store.export, checkpoint_id, job_id)
        except CorruptedCheckpoint as error:
            raise LemixError(ErrorCode.CONFLICT, str(error), param="checkpoint_id") from error
        except OSError as error:
            raise disk_error(error) from error

    async def close(self) -> None:
        """Give up what is under way; what is half written is removed at the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
