"""KV caches that sessions leave behind, so that their next turn need not compute its history again."""

from typing import NamedTuple


class Prefix(NamedTuple):
    """The KV cache of a session's newest turn, kept under the id of that request."""

    task_id: str
    tokens: int


class PrefixCache:
    """Kept prefixes by session, the one used longest ago first; at most `max_tokens` in all, 0: none.

    All of them stem from weights of one epoch: those of another would mix into answers what the weights have unlearned.
    Methods that let prefixes go return the ids of the requests whose KV cache is to be freed.
    """

    __slots__ = ("_epoch", "_max_tokens", "_prefixes", "used_tokens")

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
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

    def take(self, session_id: str) -> Prefix | None:
        """Hand a session's prefix over to its next turn; None: there is none."""
        prefix = self._prefixes.pop(session_id, None)
        if prefix is not None:
            self.used_tokens -= prefix.tokens
        return prefix

    def put(self, session_id: str, prefix: Prefix, epoch: int, room_tokens: int) -> list[str]:
        """Keep the prefix of a turn that ended, when it stems from this epoch and fits into `room_tokens`; it replaces
        the session's earlier one and pushes out those used longest ago."""
        if epoch != self._epoch or prefix.tokens > min(self._max_tokens, room_tokens):
            return [prefix.task_id]
        earlier = self.take(session_id)
        freed = [] if earlier is None else [earlier.task_id]
        freed += self.shrink(min(self._max_tokens, room_tokens) - prefix.tokens)
        self._prefixes[session_id] = prefix
        self.used_tokens += prefix.tokens
        return freed

    def shrink(self, room_tokens: int) -> list[str]:
        """Keep no more than `room_tokens`."""
        freed: list[str] = []
        while self.used_tokens > room_tokens:
            session_id = next(iter(self._prefixes))
            prefix = self._prefixes.pop(session_id)
            self.used_tokens -= prefix.tokens
            freed.append(prefix.task_id)
        return freed

    def fork(self) -> "PrefixCache":
        """An independent copy."""
        twin = PrefixCache(self._max_tokens)
        twin._epoch = self._epoch
        twin._prefixes = self._prefixes.copy()
        twin.used_tokens = self.used_tokens
        return twin
