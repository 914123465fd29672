"""A stage worker process that computes nothing: `python -m bench.engine.relay FD`.

It reads and publishes activations as a real one does, so that what is left is the cost of the runtime. The same
process, messages and transport as `services.node_agent.engine.torch.worker`.
"""

import time
from typing import Any

import torch

from services.node_agent.engine.base import StageResult
from services.node_agent.engine.handle import Handle
from services.node_agent.engine.ops import StageOp
from services.node_agent.engine.torch.transport import SharedTransport
from services.node_agent.engine.torch.wire import Ready, WorkerSetup
from services.node_agent.engine.torch.worker import serve
from services.node_agent.engine.training_ops import OptimizerStep, TrainBackward, TrainForward

ROWS, HIDDEN = 8 * 256, 384


class Relay:
    """Passes activations of (ROWS, HIDDEN) float32 on. An op's times are those of its transport alone."""

    def __init__(self, setup: WorkerSetup) -> None:
        self._is_first = setup.stage == 0
        self._is_last = setup.stage == setup.config.num_stages - 1
        self._transport = SharedTransport(setup.stage, setup.arena_fds)
        self._rows = torch.ones(ROWS, HIDDEN)
        self._version = 0
        self.ready = Ready(0, 0)

    def run(self, op: StageOp) -> StageResult:
        """Take what comes in, or publish what goes out."""
        begin_s = time.monotonic()
        fields: dict[str, Any] = {}
        if isinstance(op, TrainForward):
            begin_s, output = self._pass(op.hidden, op.task_id, ends=self._is_last)
            fields = {"output": output, "loss": 1.0, "label_tokens": 1}
        elif isinstance(op, TrainBackward):
            begin_s, output = self._pass(op.gradient, op.task_id, ends=self._is_first)
            fields = {"output": output, "grad_norm_sq": 1.0}
        elif isinstance(op, OptimizerStep):
            self._version += 1
        return StageResult(op.op_id, begin_s, time.monotonic(), self._version, **fields)

    def _pass(self, handle: Handle | None, task_id: str, *, ends: bool) -> tuple[float, Handle | None]:
        """When the transport began, and what was published."""
        begin_s = time.monotonic()
        if handle is not None:
            self._transport.take(handle, torch.device("cpu"))
        if ends:
            return begin_s, None
        # An output has just been computed, and so is in the processor's caches. That is no part of the transport.
        self._rows.add_(1.0)
        begin_s = time.monotonic()
        return begin_s, self._transport.put(self._rows, (task_id,))

    def close(self) -> None:
        """Let go of shared memory."""
        self._transport.close()


if __name__ == "__main__":
    serve(Relay)
