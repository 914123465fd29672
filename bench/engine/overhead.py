"""What the runtime adds to an op: from the end of one op's computing to the begin of the next one's, on another stage.

That is queue, versions, trace, two messages between processes and the transport of one activation, with the agent's own
loop in between. Of the ops that `speed` times: decodes of 8 requests, and micro-batches of 8 x 128 tokens.
"""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from bench.engine.figures import Figure
from bench.engine.node import Node
from bench.engine.speed import BATCH, PROMPT_TOKENS, TRAIN_TOKENS
from deploy.local.tiny_model import write_tiny_model
from services.node_agent.engine.base import EngineConfig, StageResult, StageWorker
from services.node_agent.engine.inference_ops import Decode
from services.node_agent.engine.ops import StageOp
from services.node_agent.engine.torch.arena import create_arena
from services.node_agent.engine.torch.load import read_model
from services.node_agent.engine.torch.process import ProcessStageWorker
from services.node_agent.engine.torch.wire import WorkerSetup
from services.node_agent.engine.training_ops import OptimizerSpec, TrainBackward, TrainForward

_STAGES = 2
_WARM_UP = 20
TARGET_US = 300.0

#: Results of an op that gave its activation away, and of the one that took it.
_Handover = tuple[StageResult, StageResult]


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
    """One op after the other through two stages that compute nothing: `repetitions` decodes and micro-batches."""
    path = folder / "relay"
    write_tiny_model(path, max_context_tokens=PROMPT_TOKENS + _WARM_UP + repetitions + 1)
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
    try:
        decoded = await _decode(node, results, repetitions)
        trained = await _train(node, results, repetitions)
    finally:
        await node.close()
    return [*_figures(f"decode of {BATCH} requests", decoded), *_figures("micro-batch", trained)]


async def _decode(node: Node, results: list[tuple[type, StageResult]], repetitions: int) -> list[_Handover]:
    await node.generate([(1,) * PROMPT_TOKENS] * BATCH, 2 + _WARM_UP + repetitions)
    given = {result.op_id: result for kind, result in results if kind is Decode and not result.tokens}
    # Requests that arrive together may begin in two batches: those are left out.
    taken = [result for kind, result in results if kind is Decode and len(result.tokens) == BATCH]
    return [(given[result.op_id], result) for result in taken[_WARM_UP:][:repetitions]]


async def _train(node: Node, results: list[tuple[type, StageResult]], repetitions: int) -> list[_Handover]:
    handovers: list[_Handover] = []
    for repetition in range(_WARM_UP + repetitions):
        results.clear()
        await node.train([[(1,) * TRAIN_TOKENS] * BATCH], OptimizerSpec())
        if repetition >= _WARM_UP:
            up, last, last_again, down = (r for kind, r in results if kind in (TrainForward, TrainBackward))
            handovers += [(up, last), (last_again, down)]
    return handovers


def _figures(name: str, handovers: Sequence[_Handover]) -> list[Figure]:
    """Of ops that gave an activation to the next one."""
    costs = [1e6 * (taken.end_s - given.begin_s) for given, taken in handovers]
    moves = [1e6 * (taken.end_s - taken.begin_s + given.end_s - given.begin_s) for given, taken in handovers]
    others = [cost - move for cost, move in zip(costs, moves, strict=True)]
    return [
        Figure(f"runtime cost of an op, {name}", "us", tuple(costs), TARGET_US, at_least=False),
        Figure("  of which transport of its activation", "us", tuple(moves)),
        Figure("  of which queue, versions, trace, messages", "us", tuple(others)),
    ]
