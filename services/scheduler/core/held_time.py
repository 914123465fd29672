"""How long nodes are held for their tasks."""

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class HeldTime:
    """Time a node is held: from an assignment until it has been idle for `hold_s` (tasks_per_held_node_s)."""

    hold_s: float
    #: First assignment and last end, seconds; the node's span (tasks_per_node_s).
    first_assigned_s: float | None = None
    last_ended_s: float | None = None
    _closed_s: float = 0.0
    _since_s: float | None = None
    _idle_since_s: float | None = None

    def assigned(self, now_s: float) -> None:
        """The node got a task."""
        if self.first_assigned_s is None:
            self.first_assigned_s = now_s
        self._close(now_s)
        if self._since_s is None:
            self._since_s = now_s
        self._idle_since_s = None

    def ended(self, now_s: float, *, idle: bool) -> None:
        """A task of the node ended; `idle`: it was the last one."""
        self.last_ended_s = now_s
        if idle:
            self._idle_since_s = now_s

    def is_held(self, now_s: float) -> bool:
        """Whether the node counts as held."""
        if self._since_s is None:
            return False
        return self._idle_since_s is None or now_s - self._idle_since_s < self.hold_s

    def total_s(self, now_s: float) -> float:
        """Seconds held so far."""
        if self._since_s is None:
            return self._closed_s
        end_s = now_s if self._idle_since_s is None else min(now_s, self._idle_since_s + self.hold_s)
        return self._closed_s + end_s - self._since_s

    def _close(self, now_s: float) -> None:
        if self._since_s is not None and not self.is_held(now_s):
            self._closed_s = self.total_s(now_s)
            self._since_s = None
