"""A stage worker process: `python -m services.node_agent.engine.torch.worker FD`.

It reads pickled, length-prefixed messages from the socket FD (its parent's other end) and answers each in turn. First
comes its `WorkerSetup`; it answers with `Ready` or `StartFailed`. It ends when the socket closes, so also when its
parent dies.
"""

import contextlib
import faulthandler
import gc
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast

from services.node_agent.engine.base import EngineConfig, StageResult
from services.node_agent.engine.ops import StageOp
from services.node_agent.engine.torch.wire import FRAME, Ready, Shared, Sharing, StartFailed, WorkerSetup

if TYPE_CHECKING:
    from services.node_agent.engine.torch.memory import DeviceMemories

#: A worker looks for its next op for so long before it sleeps. Most come within this time, and to wake up with cold
#: caches takes as long as all else between two ops.
_AWAKE_S = 0.001


class Executor(Protocol):
    """What runs the ops of a stage."""

    @property
    def ready(self) -> Ready:
        """What it says when it is loaded."""
        ...

    def run(self, op: StageOp) -> StageResult:
        """Run one op to its end."""
        ...

    def share(self, message: Sharing) -> Shared:
        """One step of sharing device memory with the other stages."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


def serve(make: Callable[[WorkerSetup], Executor]) -> None:
    """Serve ops until the parent closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A crash inside a kernel leaves its stack on stderr, which the parent quotes.
    faulthandler.enable()
    connection = socket.socket(fileno=int(sys.argv[1]))
    setup = _receive(connection)
    if not isinstance(setup, WorkerSetup):
        return
    _limit_process(setup.config, setup.stage)
    try:
        executor = make(setup)
        ready = executor.ready
    except Exception as error:
        _send(connection, StartFailed(type(error).__name__, str(error)))
        return
    # What is loaded stays: keep the collector from walking it during ops.
    gc.collect()
    gc.freeze()
    try:
        _send(connection, ready)
        while (message := _next_message(connection)) is not None:
            if isinstance(message, Sharing):
                _send(connection, executor.share(message))
            else:
                _send(connection, executor.run(cast(StageOp, message)))
    except (BrokenPipeError, ConnectionResetError):
        pass  # The parent is gone; so is everything that could use an answer.
    finally:
        executor.close()
        # The parent removes the engine's folder; when it was killed, its last worker does.
        with contextlib.suppress(OSError):
            setup.snapshot_folder.parent.rmdir()


def load(setup: WorkerSetup, memories: "DeviceMemories | None" = None) -> Executor:
    """The stage, warmed up. memories: how it may share memory of its device; None: as such devices do."""
    # Imported here so that thread counts and niceness are set before torch starts its threads.
    import torch

    from services.node_agent.engine.torch.cuda_memory import CudaMemories
    from services.node_agent.engine.torch.executor import StageExecutor
    from services.node_agent.engine.torch.shared_transport import SharedTransport

    torch.set_num_threads(setup.config.threads_per_stage)
    device = torch.device(setup.config.device(setup.stage))
    if memories is None and device.type == "cuda":
        memories = CudaMemories(device)
    transport = SharedTransport(setup.stage, setup.arena_fds, devices=memories)
    executor = StageExecutor(setup.config, setup.spec, setup.stage, transport, setup.snapshot_folder)
    executor.warm_up()
    torch.manual_seed(setup.config.seed)
    return executor


def _limit_process(config: EngineConfig, stage: int) -> None:
    if config.nice:
        os.nice(config.nice)
    if config.cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {config.cpus[stage]})


def _next_message(connection: socket.socket) -> object:
    """The next message, awaited awake for a short time; None when the parent closed the connection."""
    end_s = time.monotonic() + _AWAKE_S
    while time.monotonic() < end_s:
        with contextlib.suppress(BlockingIOError):
            connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            break
        os.sched_yield()
    return _receive(connection)


def _send(connection: socket.socket, message: object) -> None:
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    connection.sendall(FRAME.pack(len(body)) + body)


def _receive(connection: socket.socket) -> object:
    """The next message; None when the parent closed the connection."""
    header = _read_exactly(connection, FRAME.size)
    body = None if header is None else _read_exactly(connection, FRAME.unpack(header)[0])
    return None if body is None else pickle.loads(body)


def _read_exactly(connection: socket.socket, size: int) -> bytes | None:
    chunks = b""
    while len(chunks) < size:
        chunk = connection.recv(size - len(chunks))
        if not chunk:
            return None
        chunks += chunk
    return chunks


if __name__ == "__main__":
    serve(load)
