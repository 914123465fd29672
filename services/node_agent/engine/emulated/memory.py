"""Where an emulated stage keeps what its tasks hold: on the device, or offloaded to host memory."""

from collections.abc import Iterable, Mapping


class EmulatedMemory:
    """Bytes by task. kv_tokens, train_shapes: the stage's books of KV caches and saved activations."""

    def __init__(
        self,
        kv_tokens: Mapping[str, int],
        train_shapes: Mapping[str, tuple[int, int, int]],
        *,
        kv_bytes_per_token: int,
        activation_bytes_per_token: int,
        kv_block_tokens: int,
    ) -> None:
        self._kv_tokens = kv_tokens
        self._train_shapes = train_shapes
        self._kv_bytes = kv_bytes_per_token
        self._activation_bytes = activation_bytes_per_token
        self._block_tokens = kv_block_tokens
        self._on_host: set[str] = set()

    def task_bytes(self, task_id: str) -> int:
        """What a task holds, wherever it is; KV caches take whole blocks."""
        blocks = -(-self._kv_tokens.get(task_id, 0) // self._block_tokens)
        batch, length, _ = self._train_shapes.get(task_id, (0, 0, 1))
        return blocks * self._block_tokens * self._kv_bytes + batch * length * self._activation_bytes

    def device_bytes(self) -> int:
        """What all tasks hold on the device."""
        tasks = self._kv_tokens.keys() | self._train_shapes.keys()
        return sum(self.task_bytes(task_id) for task_id in tasks - self._on_host)

    def bytes_to_move(self, task_ids: Iterable[str], *, to_host: bool) -> int:
        """Bytes that an offload (to_host) or reload of these tasks copies; what is there already stays."""
        return sum(self.task_bytes(task_id) for task_id in task_ids if (task_id in self._on_host) != to_host)

    def offload(self, task_ids: Iterable[str]) -> None:
        """They are in host memory from now on."""
        self._on_host.update(task_ids)

    def reload(self, task_ids: Iterable[str]) -> None:
        """They are on the device from now on."""
        self._on_host.difference_update(task_ids)

    def missing(self, task_ids: Iterable[str]) -> list[str]:
        """Those of the tasks that are in host memory, where nothing can run with them."""
        return [task_id for task_id in task_ids if task_id in self._on_host]
