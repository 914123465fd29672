"""Account of what tasks hold on one stage, on its device and in host memory."""


class StageAccount:
    """What tasks hold on one stage, in bytes."""

    __slots__ = ("device", "host", "kv_tokens", "used_bytes")

    def __init__(self) -> None:
        #: Tokens in the KV cache of a request.
        self.kv_tokens: dict[str, int] = {}
        #: By task; the one used last is last.
        self.device: dict[str, int] = {}
        self.host: dict[str, int] = {}
        self.used_bytes = 0

    def hold(self, task_id: str, num_bytes: int) -> None:
        """A task uses its data here and gets more of it."""
        self.device[task_id] = self.device.pop(task_id, 0) + num_bytes
        self.used_bytes += num_bytes

    def hold_kv(self, task_id: str, tokens: int, num_bytes: int, earlier_id: str) -> None:
        """A request's KV cache holds so many tokens now. earlier_id: it was that ended request's until now."""
        if earlier_id:
            self.used_bytes -= self.device.pop(earlier_id)
            del self.kv_tokens[earlier_id]
        self.hold(task_id, num_bytes - self.device.get(task_id, 0))
        self.kv_tokens[task_id] = tokens

    def release(self, task_id: str) -> None:
        """A task needs its data here no longer."""
        self.used_bytes -= self.device.pop(task_id, 0)
        self.host.pop(task_id, None)
        self.kv_tokens.pop(task_id, None)

    def offload(self, task_id: str) -> int:
        """To host memory; returns the bytes moved."""
        num_bytes = self.host[task_id] = self.device.pop(task_id)
        self.used_bytes -= num_bytes
        return num_bytes

    def reload(self, task_id: str) -> int:
        """Back from host memory, if it is there; returns the bytes moved."""
        num_bytes = self.host.pop(task_id, 0)
        if num_bytes:
            self.hold(task_id, num_bytes)
        return num_bytes

    def fork(self) -> "StageAccount":
        """An independent copy."""
        twin = StageAccount()
        twin.device, twin.host, twin.used_bytes = self.device.copy(), self.host.copy(), self.used_bytes
        twin.kv_tokens = self.kv_tokens.copy()
        return twin
