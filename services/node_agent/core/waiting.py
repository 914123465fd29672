"""Requests that wait for their prefill: in which order they are admitted, and who may be overtaken how often."""

from bisect import bisect_left, insort
from collections.abc import Iterable
from itertools import chain

from services.node_agent.core.running import Claim
from services.node_agent.core.types import InferenceRequest, NodeCoreConfig, QueueOrder

#: A promise shorter than this is no promise; keeps urgency finite.
SHORTEST_ALLOWANCE_S = 1e-3


class WaitingRequests:
    """Requests of one node that are not admitted, in the order of their deadlines (fifo: of their arrivals)."""

    def __init__(self, config: NodeCoreConfig) -> None:
        self._config = config
        self._by_deadline = config.queue_order is QueueOrder.INFERENCE_FIRST
        # Sorted by (deadline, arrival order); fifo: (0, arrival order). The entry time is kept for fifo ranks.
        self._waiting: list[tuple[float, int, float, InferenceRequest]] = []
        self._keys: dict[str, tuple[float, int]] = {}
        self._bypassed: dict[str, int] = {}
        #: Further choices by the request that they are choices of.
        self._choices: dict[str, dict[str, InferenceRequest]] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._keys

    def __getitem__(self, index: int) -> InferenceRequest:
        return self._waiting[index][3]

    def task_ids(self) -> tuple[str, ...]:
        """Every waiting request."""
        return tuple(self._keys)

    def add(self, now_s: float, request: InferenceRequest) -> None:
        """Queue a request."""
        self._arrivals += 1
        key = (self._deadline_s(request) if self._by_deadline else 0.0, self._arrivals)
        insort(self._waiting, (*key, now_s, request))
        self._keys[request.task_id] = key
        if request.choice_of:
            self._choices.setdefault(request.choice_of, {})[request.task_id] = request

    def remove(self, task_id: str) -> None:
        """A request is admitted, or waits no longer. Raises KeyError when it does not wait."""
        request = self._waiting.pop(bisect_left(self._waiting, self._keys.pop(task_id)))[3]
        self._bypassed.pop(task_id, None)
        choices = self._choices.get(request.choice_of)
        if choices is not None:
            del choices[task_id]
            if not choices:
                del self._choices[request.choice_of]

    def choices(self, group: str) -> list[InferenceRequest]:
        """Waiting choices of a prompt, but for the first one."""
        return list(self._choices.get(group, {}).values())

    # ------------------------------------------------------------- order

    def admission_order(self, now_s: float) -> Iterable[int]:
        """Indices of waiting requests: far too late ones, those that can keep their deadline, those just too late."""
        count = len(self._waiting)
        if not self._by_deadline:
            return range(count)
        overdue = bisect_left(self._waiting, (now_s - self._config.max_demotion_s,))
        late = bisect_left(self._waiting, (now_s,), overdue)
        if late == overdue:
            return range(count)
        return chain(range(overdue), range(late, count), range(overdue, late))

    def overtaken(self, task_ids: Iterable[str]) -> None:
        """Another request was admitted before these, which do not fit."""
        for task_id in task_ids:
            self._bypassed[task_id] = self._bypassed.get(task_id, 0) + 1

    def must_be_next(self, task_ids: Iterable[str]) -> bool:
        """Whether one of these requests has been overtaken often enough."""
        return any(self._bypassed.get(task_id, 0) >= self._config.max_bypass for task_id in task_ids)

    # ------------------------------------------------------------- claims

    def claim(self, now_s: float) -> Claim:
        """Claim of the prefill of the first one."""
        _, _, ready_s, request = self._waiting[next(iter(self.admission_order(now_s)))]
        return self.prompt_claim(now_s, ready_s, request)

    def prompt_claim(self, now_s: float, ready_s: float, request: InferenceRequest) -> Claim:
        """Claim of a prompt that could have been computed, or gone on with, since `ready_s`."""
        if not self._by_deadline:
            return Claim(ready_s, request.arrival_s, SHORTEST_ALLOWANCE_S)
        deadline_s = self._deadline_s(request)
        if now_s - self._config.max_demotion_s < deadline_s < now_s:
            # Its promise is broken: as urgent as a token that is due just now, not more.
            return Claim(ready_s, now_s - self._config.default_ttft_s, self._config.default_ttft_s)
        return Claim(ready_s, request.arrival_s, max(deadline_s - request.arrival_s, SHORTEST_ALLOWANCE_S))

    def fork(self) -> "WaitingRequests":
        """An independent copy."""
        twin = WaitingRequests.__new__(WaitingRequests)
        twin.__dict__.update(self.__dict__)
        twin._waiting = self._waiting.copy()
        twin._keys = self._keys.copy()
        twin._bypassed = self._bypassed.copy()
        twin._choices = {group: choices.copy() for group, choices in self._choices.items()}
        return twin

    def _deadline_s(self, request: InferenceRequest) -> float:
        return request.arrival_s + self._config.default_ttft_s if request.deadline_s is None else request.deadline_s
