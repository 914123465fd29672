"""The parent's part in letting stages keep their outputs on their devices: all of them do, if each can read each."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from services.node_agent.engine.torch.wire import (
    CloseDeviceMemory,
    ExportDeviceMemory,
    FreeDeviceMemory,
    OpenDeviceMemory,
    Shared,
    Sharing,
    UseDeviceMemory,
)


class SharingWorker(Protocol):
    """A worker that takes part."""

    def share(self, message: Sharing) -> "asyncio.Future[Shared]":
        """One step."""
        ...


async def share_device_memory(workers: Sequence[SharingWorker]) -> str:
    """Why outputs go through host memory all the same; empty when they stay on the devices. Raises WorkerDied."""
    exported = await asyncio.gather(*(worker.share(ExportDeviceMemory()) for worker in workers))
    problem = _problem(exported)
    if not problem:
        exports = tuple(answer.export for answer in exported)
        problem = _problem(await asyncio.gather(*(worker.share(OpenDeviceMemory(exports)) for worker in workers)))
    # The driver wants memory closed by all who opened it before its owner frees it.
    for message in (CloseDeviceMemory(), FreeDeviceMemory()) if problem else (UseDeviceMemory(),):
        await asyncio.gather(*(worker.share(message) for worker in workers))
    return problem


def _problem(answers: Sequence[Shared]) -> str:
    """The first one, with its stage."""
    return next((f"stage {index}: {answer.problem}" for index, answer in enumerate(answers) if answer.problem), "")
