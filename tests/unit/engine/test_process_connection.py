"""The parent's end of a worker's socket."""

import asyncio
import socket

import pytest

from services.node_agent.engine.base import WorkerDied
from services.node_agent.engine.torch.process import _connect
from services.node_agent.engine.torch.wire import FRAME


async def test_an_answer_that_cannot_be_read_ends_the_wait() -> None:
    ours, theirs = socket.socketpair()
    lost = asyncio.Event()
    with theirs:
        connection = await _connect(ours, lost.set)
        answer = connection.ask("question")
        theirs.sendall(FRAME.pack(7) + b"garbage")
        async with asyncio.timeout(5.0):
            await lost.wait()
            connection.fail("it talks nonsense")
            with pytest.raises(WorkerDied, match="nonsense"):
                await answer
            with pytest.raises(WorkerDied, match="nonsense"):
                await connection.ask("another")
