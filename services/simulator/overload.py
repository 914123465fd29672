"""Whether requests came faster than they were answered, seen in how the queue grew."""

from collections.abc import Iterable
from dataclasses import dataclass

from services.simulator.types import Request, TaskRecord

#: The queue grows when at the end of the arrivals more requests wait than half-way, by this share of those that came in
#: between, and by so many: fewer may be chance.
_GROWTH, _FEWEST = 0.05, 10
#: Emptying it then takes at least this share of the arrivals' time: after a burst at their end it takes less.
_DRAIN = 0.05


@dataclass(frozen=True, slots=True)
class Queue:
    """The second half of the arrivals. Waiting: without a first token, or refused although others as long were not.

    grows: the work that was offered exceeds what the cluster can do.
    """

    arrived_per_s: float
    answered_per_s: float
    waiting_half_way: int
    waiting_at_end: int
    grows: bool


def queue_of(requests: Iterable[TaskRecord]) -> Queue:
    """The queue of a run."""
    records = [record for record in requests if record.outcome != "cancelled"]
    longest = max((_size(record) for record in records if record.outcome != "rejected"), default=0)
    fit = [record for record in records if _size(record) <= longest]
    last_s = max((record.work.arrival_s for record in fit), default=0.0)
    if last_s <= 0.0:
        return Queue(0.0, 0.0, 0, 0, grows=False)
    half_s = last_s / 2
    arrived = sum(record.work.arrival_s > half_s for record in fit)
    first_s = [record.first_token_s for record in fit if record.first_token_s is not None]
    before, at_end = (
        sum(record.work.arrival_s <= at_s for record in fit) - sum(first <= at_s for first in first_s)
        for at_s in (half_s, last_s)
    )
    has_unanswered = len(first_s) < len(fit)
    drains_slowly = has_unanswered or max(first_s) - last_s > _DRAIN * last_s
    grown = at_end - before
    return Queue(
        arrived / half_s,
        (arrived - grown) / half_s,
        before,
        at_end,
        grows=grown >= _FEWEST and grown > _GROWTH * arrived and drains_slowly,
    )


def _size(record: TaskRecord) -> int:
    work = record.work
    return work.prompt_tokens + work.max_tokens if isinstance(work, Request) else 0
