"""What every stage of a node core holds, worked out from its ops alone."""

import math
from collections.abc import Iterable

from services.latency import MOVES, OpKind
from services.node_agent.core.types import (
    MemoryConfig,
    Op,
)


class MemoryChecker:
    """What every stage holds, worked out from the ops alone."""

    def __init__(self, config: MemoryConfig, num_stages: int, block_tokens: int) -> None:
        self.config = config
        self.block_tokens = block_tokens
        self.tokens: list[dict[str, int]] = [{} for _ in range(num_stages)]
        self.device: list[dict[str, int]] = [{} for _ in range(num_stages)]
        self.host: list[dict[str, int]] = [{} for _ in range(num_stages)]
        self.prompts: dict[str, int] = {}

    def ran(self, stage: int, op: Op) -> None:
        """An op starts: what it uses is here, and everything fits."""
        device, host = self.device[stage], self.host[stage]
        if op.kind in MOVES:
            source, target = (device, host) if op.kind is OpKind.OFFLOAD else (host, device)
            assert op.num_bytes == sum(source[task_id] for task_id in op.task_ids) > 0
            target.update({task_id: source.pop(task_id) for task_id in op.task_ids})
            return
        assert not {*op.task_ids, *op.continued} & host.keys(), f"{op.kind} needs what is in host memory"
        tokens = self.tokens[stage]
        for earlier_id in filter(None, op.continued):
            del device[earlier_id]
        for index, task_id in enumerate(op.task_ids):
            if op.kind is OpKind.PREFILL and index < len(op.task_ids) - op.decodes:
                tokens[task_id] = op.end_tokens[index] if op.end_tokens else self.prompts[task_id]
                device[task_id] = self._kv_bytes(tokens[task_id])
            elif op.kind in (OpKind.PREFILL, OpKind.DECODE):
                tokens[task_id] += 1
                device[task_id] = self._kv_bytes(tokens[task_id])
            elif op.kind is OpKind.TRAIN_FORWARD and op.part == 0:
                device[task_id] = op.num_tokens * self.config.activation_bytes_per_token
            elif op.kind is OpKind.TRAIN_BACKWARD:
                assert task_id in device
        assert sum(device.values()) <= self.config.kappa * self.config.peak_bytes

    def _kv_bytes(self, tokens: int) -> int:
        return math.ceil(tokens / self.block_tokens) * self.block_tokens * self.config.kv_bytes_per_token

    def stages(self) -> Iterable[tuple[dict[str, int], dict[str, int]]]:
        """Bytes by task on every stage: on its device, and in host memory."""
        return zip(self.device, self.host, strict=True)

    def free(self, task_id: str, stages: Iterable[int]) -> None:
        """A task holds nothing there any more."""
        for stage in stages:
            self.device[stage].pop(task_id, None)
            self.host[stage].pop(task_id, None)
