"""Blocking work in threads."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def to_its_end(work: Callable[..., T], *arguments: Any) -> T:
    """Run blocking work in a thread, also when cancelled: a thread cannot be stopped, and what comes next must not
    touch the same files."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(running)
    finally:
        while not running.done():  # cancelled, perhaps more than once
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([running])
