"""Account of the KV cache of one node, in tokens of whole blocks."""


def whole_blocks(tokens: int, block_tokens: int) -> int:
    """Tokens rounded up to whole blocks."""
    return -(-tokens // block_tokens) * block_tokens


class KvLedger:
    """Who reserved how much of the KV cache; everything is rounded up to blocks, and the capacity down.

    A request reserves its worst case (prompt + max_tokens) before its prefill, so a running request never runs out, or
    what is expected, and more when it needs it.
    """

    __slots__ = ("_block_tokens", "_reserved", "capacity_tokens", "used_tokens")

    def __init__(self, capacity_tokens: int, block_tokens: int = 1) -> None:
        self._block_tokens = block_tokens
        self.capacity_tokens = capacity_tokens // block_tokens * block_tokens
        self.used_tokens = 0
        self._reserved: dict[str, int] = {}

    def need(self, tokens: int) -> int:
        """What this many tokens take."""
        return whole_blocks(tokens, self._block_tokens)

    def fits(self, tokens: int) -> bool:
        """Whether `tokens` can be reserved now."""
        return self.used_tokens + self.need(tokens) <= self.capacity_tokens

    def reserve(self, task_id: str, tokens: int) -> None:
        """Reserve; raises ValueError when they do not fit or the task has a reservation."""
        if task_id in self._reserved or not self.fits(tokens):
            raise ValueError(f"cannot reserve {tokens} KV tokens for {task_id!r}: {self.used_tokens} used")
        self._reserved[task_id] = need = self.need(tokens)
        self.used_tokens += need

    def lack(self, task_id: str, tokens: int) -> int:
        """What a task must reserve in addition to hold this many tokens."""
        return max(0, self.need(tokens) - self._reserved[task_id])

    def grow(self, task_id: str, lack: int) -> None:
        """Reserve in addition; raises ValueError when it does not fit."""
        if self.used_tokens + lack > self.capacity_tokens:
            raise ValueError(f"cannot reserve {lack} more KV tokens for {task_id!r}: {self.used_tokens} used")
        self._reserved[task_id] += lack
        self.used_tokens += lack

    def release(self, task_id: str) -> None:
        """Give a reservation back; raises KeyError when there is none, so nothing is freed twice."""
        self.used_tokens -= self._reserved.pop(task_id)

    def fork(self) -> "KvLedger":
        """An independent copy."""
        twin = KvLedger(self.capacity_tokens, self._block_tokens)
        twin.used_tokens = self.used_tokens
        twin._reserved = self._reserved.copy()
        return twin
