"""Where the newest turn of every session ran, and how much of its context that node is believed to keep.

A session's next turn comes when the one before it has ended, so a turn that arrives while the other is still believed
to run finds its KV cache kept as well: the report of the end is on its way.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.scheduler.core.state import LiveInference, NodeState


@dataclass(slots=True, eq=False)
class _Session:
    node: "NodeState"
    #: The turn that runs; its KV cache is part of what the node reserved for it. None: between two turns.
    live: "LiveInference | None"
    tokens: int = 0
    #: Weights its KV cache stems from, at the earliest.
    weight_step: int = 0


class Sessions:
    """The `most` newest sessions with a turn on a node that keeps prefixes. Forgotten with the node.

    A node is believed to keep what it may (`NodeSpec.prefix_cache_tokens`) as far as its requests leave room, and to
    let go of what it used longest ago.
    """

    __slots__ = ("_by_node", "_kept_tokens", "_most", "_sessions")

    def __init__(self, most: int) -> None:
        self._most = most
        #: The one used longest ago first; the same by node, without those that have a turn running.
        self._sessions: dict[str, _Session] = {}
        self._by_node: dict[str, dict[str, None]] = {}
        self._kept_tokens: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def keeper(self, session_id: str) -> "NodeState | None":
        """The node that a session's newest turn went to."""
        session = self._sessions.get(session_id)
        return None if session is None else session.node

    def cached_tokens(self, live: "LiveInference", node: "NodeState") -> int:
        """Leading tokens of a prompt whose KV cache a node is believed to keep."""
        session = self._sessions.get(live.task.session_id)
        if session is None or session.node is not node:
            return 0
        tokens, weight_step = session.tokens, session.weight_step
        if session.live is not None:
            tokens, weight_step = _running_tokens(session.live), session.live.weight_step
        if weight_step // node.spec.epoch_steps != node.weight_step // node.spec.epoch_steps:
            return 0
        return min(tokens, live.task.prompt_tokens - 1)

    def assigned(self, live: "LiveInference", node: "NodeState") -> None:
        """A request goes to a node, which makes room for it; what another one keeps of its session is forgotten."""
        session_id = live.task.session_id
        if not node.spec.prefix_cache_tokens:
            return
        if session_id:
            self._forget(session_id)
            self._sessions[session_id] = _Session(node, live)
            if len(self._sessions) > self._most:
                self._forget(next(iter(self._sessions)))
        self._shrink(node)

    def ended(self, live: "LiveInference", node: "NodeState", output_tokens: int) -> None:
        """A turn left its node, which keeps its KV cache when it ended well; output_tokens 0: it did not."""
        session_id = live.task.session_id
        session = self._sessions.get(session_id)
        if session is None or session.live is not live:
            return
        self._forget(session_id)
        if not output_tokens:
            return
        # The newest token is in no cache: no operation has read it.
        tokens = live.task.prompt_tokens + output_tokens - 1
        self._sessions[session_id] = _Session(node, None, tokens, live.weight_step)
        self._by_node.setdefault(node.node_id, {})[session_id] = None
        self._kept_tokens[node.node_id] = self._kept_tokens.get(node.node_id, 0) + tokens
        self._shrink(node)

    def node_lost(self, node: "NodeState") -> None:
        """A node is gone, and what it kept."""
        for session_id in self._by_node.pop(node.node_id, {}):
            del self._sessions[session_id]
        self._kept_tokens.pop(node.node_id, None)
        for live in node.inference.values():
            if self.keeper(live.task.session_id) is node:
                self._forget(live.task.session_id)

    def _shrink(self, node: "NodeState") -> None:
        spec = node.spec
        room_tokens = max(0, min(spec.prefix_cache_tokens, spec.kv_capacity_tokens - node.reserved_tokens))
        while self._kept_tokens.get(node.node_id, 0) > room_tokens:
            self._forget(next(iter(self._by_node[node.node_id])))

    def _forget(self, session_id: str) -> None:
        session = self._sessions.pop(session_id, None)
        if session is not None and session.live is None:
            node_id = session.node.node_id
            del self._by_node[node_id][session_id]
            self._kept_tokens[node_id] -= session.tokens


def _running_tokens(live: "LiveInference") -> int:
    """Tokens that would be kept of a turn if it had just ended."""
    return live.context_tokens if live.has_first_token else 0
