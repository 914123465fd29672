"""KV caches that sessions leave behind, so that their next turn need not compute its history again."""

from collections.abc import Container, Iterator
from typing import NamedTuple

from services.node_agent.core.memory import whole_blocks


class Prefix(NamedTuple):
    """The KV cache of a session's newest turn, kept under the id of that request."""

    task_id: str
    tokens: int


class PrefixCache:
    """Kept prefixes by session, the one used longest ago first; at most `max_tokens` in all, 0: none. What is counted
    are tokens of whole blocks.

    All of them stem from weights of one epoch: those of another would mix into answers what the weights have unlearned.
    Methods that let prefixes go return the ids of the requests whose KV cache is to be freed.
    """

    __slots__ = ("_block_tokens", "_epoch", "_max_tokens", "_prefixes", "used_tokens")

    def __init__(self, max_tokens: int, block_tokens: int = 1) -> None:
        self._max_tokens = max_tokens
        self._block_tokens = block_tokens
        self._epoch = 0
        self._prefixes: dict[str, Prefix] = {}
        self.used_tokens = 0

    def enter(self, epoch: int) -> list[str]:
        """The weights are of this epoch now: what stems from an earlier one goes."""
        if epoch == self._epoch:
            return []
        self._epoch = epoch
        return self.shrink(0)

    def tokens_of(self, session_id: str) -> int:
        """Tokens kept for a session."""
        prefix = self._prefixes.get(session_id)
        return 0 if prefix is None else prefix.tokens

    def task_ids(self) -> Iterator[str]:
        """The requests whose KV cache is kept, the one used longest ago first."""
        return (prefix.task_id for prefix in self._prefixes.values())

    def drop(self, task_ids: Container[str]) -> None:
        """Let go of the KV caches of these requests."""
        for session_id in [name for name, prefix in self._prefixes.items() if prefix.task_id in task_ids]:
            self.take(session_id)

    def take(self, session_id: str) -> Prefix | None:
        """Hand a session's prefix over to its next turn; None: there is none."""
        prefix = self._prefixes.pop(session_id, None)
        if prefix is not None:
            self.used_tokens -= self._held(prefix)
        return prefix

    def put(self, session_id: str, prefix: Prefix, epoch: int, room_tokens: int) -> list[str]:
        """Keep the prefix of a turn that ended, when it stems from this epoch and fits into `room_tokens`; it replaces
        the session's earlier one and pushes out those used longest ago."""
        most_tokens = min(self._max_tokens, room_tokens)
        held = self._held(prefix)
        if epoch != self._epoch or held > most_tokens:
            return [prefix.task_id]
        earlier = self.take(session_id)
        freed = [] if earlier is None else [earlier.task_id]
        freed += self.shrink(most_tokens - held)
        self._prefixes[session_id] = prefix
        self.used_tokens += held
        return freed

    def shrink(self, room_tokens: int) -> list[str]:
        """Keep no more than `room_tokens`."""
        freed: list[str] = []
        while self.used_tokens > room_tokens:
            session_id = next(iter(self._prefixes))
            prefix = self._prefixes.pop(session_id)
            self.used_tokens -= self._held(prefix)
            freed.append(prefix.task_id)
        return freed

    def fork(self) -> "PrefixCache":
        """An independent copy."""
        twin = PrefixCache(self._max_tokens, self._block_tokens)
        twin._epoch = self._epoch
        twin._prefixes = self._prefixes.copy()
        twin.used_tokens = self.used_tokens
        return twin

    def _held(self, prefix: Prefix) -> int:
        return whole_blocks(prefix.tokens, self._block_tokens)
