"""What the runtime adds to an op: from the end of one op's computing to the begin of the next one's, on another stage.

That is queue, versions, trace, two messages between processes and the transport of one activation of [8, 256, 384]
float32, with the agent's own loop in between.
"""

import asyncio
import os
from pathlib import Path

from bench.engine.figures import Figure
from bench.engine.node import Node
from deploy.local.tiny_model import write_tiny_model
from services.node_agent.engine.base import EngineConfig, StageResult, StageWorker
from services.node_agent.engine.ops import StageOp
from services.node_agent.engine.torch.arena import create_arena
from services.node_agent.engine.torch.load import read_model
from services.node_agent.engine.torch.process import ProcessStageWorker
from services.node_agent.engine.torch.wire import WorkerSetup
from services.node_agent.engine.training_ops import OptimizerSpec, TrainBackward, TrainForward

_STAGES = 2
_WARM_UP = 20
TARGET_US = 300.0


class _Recorder:
    """A stage worker, and when its ops began and ended. Implements StageWorker."""

    def __init__(self, worker: StageWorker, results: list[tuple[type, StageResult]]) -> None:
        self._worker = worker
        self._results = results

    @property
    def pid(self) -> int:
        """See StageWorker."""
        return self._worker.pid

    def run(self, op: StageOp) -> "asyncio.Future[StageResult]":
        """See StageWorker."""
        answer = self._worker.run(op)
        answer.add_done_callback(lambda done: self._results.append((type(op), done.result())))
        return answer

    async def close(self) -> None:
        """See StageWorker."""
        await self._worker.close()


async def measure(repetitions: int, folder: Path) -> list[Figure]:
    """One micro-batch after the other through two stages."""
    path = folder / "relay"
    write_tiny_model(path)
    config = EngineConfig(model_path=str(path), num_stages=_STAGES)
    spec = read_model(config.model_path)
    fds = [create_arena() for _ in range(_STAGES)]
    workers: list[ProcessStageWorker] = []
    try:
        for stage in range(_STAGES):
            setup = WorkerSetup(config, spec, stage, fds, folder / f"relay-{stage}")
            workers.append(await ProcessStageWorker.start(setup, fds, module="bench.engine.relay"))
        return await _measure(workers, repetitions)
    finally:
        for fd in fds:
            os.close(fd)
        for worker in workers:
            await worker.close()


async def _measure(workers: list[ProcessStageWorker], repetitions: int) -> list[Figure]:
    results: list[tuple[type, StageResult]] = []
    node = Node([_Recorder(worker, results) for worker in workers])
    costs: list[float] = []
    transports: list[float] = []
    try:
        for repetition in range(_WARM_UP + repetitions):
            results.clear()
            await node.train([[(1, 2)]], OptimizerSpec())
            if repetition < _WARM_UP:
                continue
            ops = [result for kind, result in results if kind in (TrainForward, TrainBackward)]
            # Up, then down: the middle two run on the last stage, with nothing to transport between them.
            for sent, taken in ((ops[0], ops[1]), (ops[2], ops[3])):
                costs.append(1e6 * (taken.end_s - sent.begin_s))
                transports.append(1e6 * (taken.end_s - taken.begin_s + sent.end_s - sent.begin_s))
    finally:
        await node.close()
    others = [cost - transport for cost, transport in zip(costs, transports, strict=True)]
    return [
        Figure("runtime cost of an op", "us", tuple(costs), TARGET_US, at_least=False),
        Figure("  of which transport of its activation", "us", tuple(transports)),
        Figure("  of which queue, versions, trace, messages", "us", tuple(others)),
    ]
