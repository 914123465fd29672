"""Requests that arrive when another one has ended: turns of a conversation, steps of an agent."""

from collections.abc import Iterable
from dataclasses import replace

from services.simulator.types import Request, Work


class Dependents:
    """What still waits for the end of another request. Raises ValueError for one that is not before it in `work`."""

    __slots__ = ("_after",)

    def __init__(self, work: Iterable[Work]) -> None:
        self._after: dict[str, list[Request]] = {}
        earlier: set[str] = set()
        for item in work:
            if isinstance(item, Request):
                if item.after:
                    if item.after not in earlier:
                        raise ValueError(f"task {item.task_id} comes after {item.after}, which is not before it")
                    self._after.setdefault(item.after, []).append(item)
                earlier.add(item.task_id)

    def ended(self, now_s: float, task_id: str) -> list[Request]:
        """Those that waited for this request, which ended well, with the time of their arrival."""
        return [
            replace(request, arrival_s=max(request.arrival_s, now_s + request.think_s))
            for request in self._after.pop(task_id, ())
        ]

    def failed(self, task_id: str) -> list[Request]:
        """Those that will never arrive because this request ended badly, at first or second hand."""
        never = self._after.pop(task_id, [])
        for request in never:
            never += self._after.pop(request.task_id, ())
        return never
