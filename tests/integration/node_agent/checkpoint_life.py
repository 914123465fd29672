"""Lives of a node with checkpoints, for the tests of what becomes of them.

The emulated weights shrink by a tenth with every step, so that a weight tells how many steps it contains.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lemix.internal.v1 import scheduler_service_pb2 as scheduler_pb2
from lemix.internal.v1 import work_pb2
from services.ledger import LedgerUnavailable
from services.node_agent.engine.base import StageResult
from services.node_agent.engine.ops import StageOp
from services.node_agent.engine.weight_ops import SaveCheckpoint
from tests.integration.node_agent.harness import (
    Cluster,
    Gate,
    Node,
    training_item,
)

NO_TIME = {"checkpoint_every_s": 0.0, "checkpoint_every_steps": 0}


class Away:
    """A ledger in which nothing can be finished."""

    def __init__(self, ledger: Any) -> None:
        self._ledger = ledger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ledger, name)

    async def finish(self, *_: Any) -> bool:
        raise LedgerUnavailable("redis://nowhere is away")


def after_steps(count: int) -> float:
    """An emulated weight after so many steps."""
    return 4.0 * 0.9**count


def weights(node: Node) -> list[float]:
    return [worker.stage.weight for worker in node.engine.workers]


async def train(made: Cluster, sequences: Sequence[int], **work: Any) -> None:
    """Assign micro-batches of one job, in order."""
    for sequence in sequences:
        item = training_item("job", sequence, [[1, 2, 3]])
        item.training.checkpoint.CopyFrom(work_pb2.TrainingWork(**work).checkpoint)
        await made.assign(item)


async def trained(made: Cluster, count: int) -> None:
    await made.scheduler.until(lambda: len(made.scheduler.trained) >= count, f"{count} trained micro-batches")


async def train_and_save(made: Cluster, count: int) -> None:
    """That many micro-batches from the first on, with a checkpoint after every second one."""
    for sequence in range(count):
        await train(made, [sequence])
        await trained(made, sequence + 1)
        if sequence % 2:
            await made.scheduler.checkpoint((sequence + 1) // 2)


def command(made: Cluster, **action: str) -> None:
    request = scheduler_pb2.CheckpointCommand(request_id="request", **action)
    made.scheduler.command("node-0", checkpoint=request)


async def states(made: Cluster, count: int) -> list[str]:
    """Where the ledger says the first micro-batches are."""
    records = [await made.ledger.record(f"job/{sequence}") for sequence in range(count)]
    return [str(record.state) for record in records if record is not None]


@contextlib.asynccontextmanager
async def life(made: Cluster, folder: Path, **settings: Any) -> AsyncIterator[Node]:
    """A node that ends with the block as if it were killed: nothing is finished, nothing is saved."""
    async with contextlib.AsyncExitStack() as stack:
        yield await made.start_node(stack=stack, checkpoint_directory=str(folder), **{**NO_TIME, **settings})


async def two_checkpoints(made: Cluster, folder: Path) -> None:
    async with life(made, folder, checkpoint_every_steps=2):
        await train_and_save(made, 4)
        await made.scheduler.outcome("job/3")


def newest(folder: Path) -> Path:
    return max((folder / "node-0").glob("[0-9]*"))


class Disk:
    """Lets checkpoints fail on a stage as a full disk does."""

    def __init__(self) -> None:
        self.full = False

    def __call__(self, stage: int, op: StageOp, result: StageResult) -> StageResult:
        if self.full and isinstance(op, SaveCheckpoint):
            return replace(result, error="OSError: [Errno 28] No space left on device")
        return result


class Jitter(Gate):
    """Ops take a few turns of the loop, each stage and op another number."""

    def __init__(self) -> None:
        super().__init__()
        self._random = random.Random(7)

    async def sleep(self, seconds: float) -> None:
        for _ in range(self._random.randrange(4)):
            await asyncio.sleep(0)
