"""A stage worker process that computes nothing: `python -m bench.engine.relay FD`.

It reads and publishes activations as a real one does, so that what is left is the cost of the runtime. The same
process, messages and transport as `services.node_agent.engine.torch.worker`.
"""

import time
from typing import Any

import torch

from services.node_agent.engine.base import StageResult
from services.node_agent.engine.handle import Handle
from services.node_agent.engine.inference_ops import Decode, Prefill, SampledToken
from services.node_agent.engine.ops import StageOp
from services.node_agent.engine.torch.shared_transport import SharedTransport
from services.node_agent.engine.torch.wire import Ready, Shared, Sharing, WorkerSetup
from services.node_agent.engine.torch.worker import serve
from services.node_agent.engine.training_ops import OptimizerStep, TrainBackward, TrainForward

HIDDEN = 384
_MAX_ROWS = 8 * 256


class Relay:
    """Passes activations of (tokens, HIDDEN) float32 on. An op's times are those of its transport alone."""

    def __init__(self, setup: WorkerSetup) -> None:
        self._is_first = setup.stage == 0
        self._is_last = setup.stage == setup.config.num_stages - 1
        self._transport = SharedTransport(setup.stage, setup.arena_fds)
        self._computed = torch.ones(_MAX_ROWS, HIDDEN)
        self._private = torch.ones(_MAX_ROWS, HIDDEN)
        self._version = 0
        #: Tokens of the micro-batch that is on its way.
        self._trained_tokens = 0
        self.ready = Ready(0, 0)

    def run(self, op: StageOp) -> StageResult:
        """Take what comes in, or publish what goes out."""
        begin_s = time.monotonic()
        fields: dict[str, Any] = {}
        if isinstance(op, Prefill | Decode):
            names = [sequence.request_id for sequence in op.sequences]
            rows = len(names)
            if isinstance(op, Prefill):
                rows = sum(len(prompt.token_ids) for prompt in op.sequences) + len(op.decodes)
                names += [sequence.request_id for sequence in op.decodes]
            begin_s, output = self._pass(op.hidden, rows, names, ends=self._is_last)
            tokens = tuple(SampledToken(name, 0) for name in names) if self._is_last else ()
            fields = {"output": output, "tokens": tokens}
        elif isinstance(op, TrainForward):
            self._trained_tokens = sum(len(example.token_ids) for example in op.examples)
            begin_s, output = self._pass(op.hidden, self._trained_tokens, [op.task_id], ends=self._is_last)
            fields = {"output": output, "loss": 1.0, "label_tokens": 1}
        elif isinstance(op, TrainBackward):
            begin_s, output = self._pass(op.gradient, self._trained_tokens, [op.task_id], ends=self._is_first)
            fields = {"output": output, "grad_norm_sq": 1.0}
        elif isinstance(op, OptimizerStep):
            self._version += 1
        return StageResult(op.op_id, begin_s, time.monotonic(), self._version, **fields)

    def _pass(self, handle: Handle | None, rows: int, names: list[str], *, ends: bool) -> tuple[float, Handle | None]:
        """When the transport began, and what was published for these tasks."""
        begin_s = time.monotonic()
        if handle is not None:
            self._transport.take(handle, torch.device("cpu"))
        if ends:
            return begin_s, None
        # An output has just been computed, and so is in the processor's caches. That is no part of the transport. But
        # that a real one is computed where the next stage reads it is, as far as it takes longer than elsewhere.
        computed = self._computed[:rows].add_(1.0)
        elsewhere_s = _timed_add(computed, self._private[:rows])
        begin_s = time.monotonic()
        output = self._transport.allocate(computed.shape, computed.dtype, computed.device)
        begin_s += min(_timed_add(computed, output), elsewhere_s)
        return begin_s, self._transport.put(output, names)

    def share(self, message: Sharing) -> Shared:
        """One step of sharing device memory."""
        return self._transport.share(message)

    def close(self) -> None:
        """Let go of shared memory."""
        self._transport.close()


def _timed_add(computed: torch.Tensor, output: torch.Tensor) -> float:
    """What an addition takes, seconds."""
    begin_s = time.monotonic()
    torch.add(computed, 1.0, out=output)
    return time.monotonic() - begin_s


if __name__ == "__main__":
    serve(Relay)
