"""The parent's side of a stage worker process."""

import asyncio
import contextlib
import logging
import os
import pickle
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import deque
from collections.abc import Callable, Sequence
from typing import cast

from services.node_agent.engine.base import StageResult, WorkerDied
from services.node_agent.engine.ops import StageOp
from services.node_agent.engine.torch.load import ModelDirectoryError
from services.node_agent.engine.torch.wire import FRAME, Ready, Shared, Sharing, StartFailed, WorkerSetup

_LOG = logging.getLogger(__name__)
WORKER_MODULE = "services.node_agent.engine.torch.worker"
_CLOSE_S = 3.0
_STDERR_LINES = 20
#: Longest line of a worker's stderr that is read whole, bytes.
_STDERR_LIMIT = 1 << 20


class ProcessStageWorker:
    """A StageWorker in a process of its own. Ops are answered in the order they were sent."""

    def __init__(self, stage: int, process: Process, stderr_lines: deque[str]) -> None:
        self.stage = stage
        self._process = process
        self._stderr_lines = stderr_lines
        #: What the stage said when it was loaded.
        self.ready: Ready
        self._connection: _Connection
        self._stderr_task: asyncio.Task[None]
        self._death: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls, setup: WorkerSetup, inherited_fds: Sequence[int], *, module: str = WORKER_MODULE
    ) -> "ProcessStageWorker":
        """Start a process and wait until its stage is loaded. Raises what kept it from loading, or WorkerDied."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await _spawn(module, theirs.fileno(), inherited_fds, setup.config.threads_per_stage)
        except BaseException:
            ours.close()
            raise
        worker = cls(setup.stage, process, deque(maxlen=_STDERR_LINES))
        worker._stderr_task = asyncio.create_task(worker._read_stderr())
        worker._connection = await _connect(ours, worker._lost)
        try:
            answer = await worker._connection.ask(setup)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await worker.close()
            raise
        if isinstance(answer, StartFailed):
            await worker.close()
            raise _start_error(setup.stage, answer)
        assert isinstance(answer, Ready)
        worker.ready = answer
        return worker

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def run(self, op: StageOp) -> "asyncio.Future[StageResult]":
        """See StageWorker."""
        return cast("asyncio.Future[StageResult]", self._connection.ask(op))

    def share(self, message: Sharing) -> "asyncio.Future[Shared]":
        """One step of sharing device memory with the other stages."""
        return cast("asyncio.Future[Shared]", self._connection.ask(message))

    async def close(self) -> None:
        """See StageWorker. Closing the connection ends an idle worker; one that does not end is killed."""
        self._connection.close()
        try:
            await asyncio.wait_for(self._process.wait(), _CLOSE_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        await self._stderr_task
        if self._death is not None:
            await self._death

    def _lost(self) -> None:
        """The connection has ended and somebody waits for an answer."""
        if self._death is None:
            self._death = asyncio.create_task(self._describe_death())

    async def _describe_death(self) -> None:
        try:
            code = str(await asyncio.wait_for(self._process.wait(), _CLOSE_S))
            await asyncio.wait((self._stderr_task,), timeout=_CLOSE_S)
        except TimeoutError:
            code = "none (still running, connection lost)"
        message = f"stage {self.stage} worker (pid {self.pid}) ended with exit code {code}"
        self._connection.fail(": ".join((message, "\n".join(self._stderr_lines))) if self._stderr_lines else message)

    async def _read_stderr(self) -> None:
        stream = self._process.stderr
        assert stream is not None
        while line := await stream.readline():
            text = line.decode(errors="replace").rstrip()
            self._stderr_lines.append(text)
            _LOG.warning("stage %d worker: %s", self.stage, text)


class _Connection(asyncio.Protocol):
    """Length-prefixed messages; answers come in the order of the questions.

    `on_lost` is called when the other side is gone and answers are missing; they fail when its caller calls `fail`.
    """

    def __init__(self, on_lost: Callable[[], None]) -> None:
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.WriteTransport
        self._waiting: deque[asyncio.Future[object]] = deque()
        self._received = bytearray()
        self._lost = False
        self._why_lost = ""

    def ask(self, message: object) -> "asyncio.Future[object]":
        """Send a message; its answer. The future raises WorkerDied when the other side is gone."""
        answer: asyncio.Future[object] = self._loop.create_future()
        if not self._lost:
            body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
            self._waiting.append(answer)
            self._transport.write(FRAME.pack(len(body)) + body)
        elif self._why_lost:
            answer.set_exception(WorkerDied(self._why_lost))
        else:
            self._waiting.append(answer)
            self._on_lost()
        return answer

    def fail(self, why: str) -> None:
        """End what waits for an answer, and will, with WorkerDied."""
        self._why_lost = why
        while self._waiting:
            answer = self._waiting.popleft()
            if not answer.done():
                answer.set_exception(WorkerDied(why))

    def close(self) -> None:
        """End the connection."""
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._received += data
        while len(self._received) >= FRAME.size:
            end = FRAME.size + FRAME.unpack_from(self._received)[0]
            if len(self._received) < end:
                return
            # Unpickled first: if that raises, the connection ends and whoever waits is told.
            message = pickle.loads(self._received[FRAME.size : end])
            del self._received[:end]
            answer = self._waiting.popleft()
            if not answer.done():
                answer.set_result(message)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._lost = True
        if any(not answer.done() for answer in self._waiting):
            self._on_lost()


async def _spawn(module: str, socket_fd: int, inherited_fds: Sequence[int], threads: int) -> Process:
    """Start the process. A cancelled start waits until there is a process to kill, so that none is left behind."""
    starting = asyncio.create_task(
        asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            str(socket_fd),
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=PIPE,
            limit=_STDERR_LIMIT,
            pass_fds=(socket_fd, *inherited_fds),
            env=_environment(threads),
        )
    )
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        process = await starting
        process.kill()
        await process.communicate()
        raise


async def _connect(connected: socket.socket, on_lost: Callable[[], None]) -> "_Connection":
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(lambda: _Connection(on_lost), sock=connected)
    return connection


def _start_error(stage: int, failure: StartFailed) -> Exception:
    if failure.kind == ModelDirectoryError.__name__:
        return ModelDirectoryError(failure.message)
    if failure.kind == ValueError.__name__:
        return ValueError(failure.message)
    return WorkerDied(f"stage {stage} worker could not start: {failure.kind}: {failure.message}")


def _environment(threads: int) -> dict[str, str]:
    """The parent's environment, with its import path and as many OpenMP threads as the stage may use."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
