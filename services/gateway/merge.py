"""Several asynchronous sources as one."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def merged(sources: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    """Items of all sources as they come, each source's in order. The first failure of a source is raised, and ends the
    others, as closing the iterator does. One item per source is taken ahead of the consumer, so that none starves."""
    items: asyncio.Queue[tuple[T, asyncio.Semaphore] | BaseException | None] = asyncio.Queue()

    async def pump(source: AsyncGenerator[T]) -> None:
        room = asyncio.Semaphore(1)
        try:
            async with aclosing(source):
                async for item in source:
                    await room.acquire()
                    items.put_nowait((item, room))
        except Exception as error:
            items.put_nowait(error)
        else:
            items.put_nowait(None)

    tasks = [asyncio.create_task(pump(source)) for source in sources]
    try:
        left = len(tasks)
        while left:
            item = await items.get()
            if item is None:
                left -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item[0]
                item[1].release()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
