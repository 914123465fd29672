"""The micro-batches of one job: which may be offered, which are under way, which are done and which are saved."""

import heapq

from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2

#: Micro-batches between the first untrained one and the newest offered: bounds memory, and the search after a restart.
WINDOW = 1024


class Microbatches:
    """No I/O. Sequences count micro-batches from 0; progress up to the first untrained one is in the job's record."""

    def __init__(self, record: work_pb2.JobRecord, *, resumed: bool) -> None:
        #: As stored: progress up to `next_sequence`, the first micro-batch not trained.
        self._record = record
        #: Outcomes beyond that.
        self._ahead: dict[int, work_pb2.WorkOutcome] = {}
        #: Done beyond that before the job ended and went on: the record counts them.
        self._counted = set(record.done_ahead)
        #: Trained, and in no checkpoint of their node yet: they may come back to be trained again.
        self._uncovered: dict[int, work_pb2.WorkOutcome] = {}
        #: The first of them for which its node was asked to save because the window is full.
        self._asked_for: int | None = None
        #: In the core: without a node, and on one.
        self.waiting: set[int] = set()
        self._placed: set[int] = set()
        self._released: list[int] = []
        self._next_offer = record.next_sequence
        self._known_until = record.next_sequence + WINDOW if resumed else record.next_sequence

    # ------------------------------------------------------------- what is known

    @property
    def num_done(self) -> int:
        """Trained, saved or not, or skipped."""
        job = self._record.job
        return job.trained_microbatches + job.skipped_microbatches + len(self._ahead) + len(self._uncovered)

    @property
    def num_skipped(self) -> int:
        """Those whose loss or gradient was not finite."""
        ahead = sum(outcome.training.skipped for outcome in self._ahead.values())
        return self._record.job.skipped_microbatches + ahead

    @property
    def unsaved_nodes(self) -> set[str]:
        """Nodes with micro-batches that no checkpoint contains."""
        return {outcome.node_id for outcome in self._uncovered.values()}

    @property
    def num_unsaved(self) -> int:
        """Trained ones that no checkpoint contains."""
        return len(self._uncovered)

    @property
    def under_way(self) -> bool:
        """Whether the core holds any."""
        return bool(self.waiting or self._placed)

    @property
    def begun(self) -> bool:
        """Whether any is done or on a node."""
        return bool(self.num_done or self._placed)

    def is_unsaved(self, sequence: int) -> bool:
        """Whether it was trained, and no checkpoint contains it."""
        return sequence in self._uncovered

    def is_done(self, sequence: int) -> bool:
        """Whether it is trained for good, or skipped."""
        return sequence < self._record.next_sequence or sequence in self._ahead or sequence in self._counted

    def is_known(self, sequence: int) -> bool:
        """Whether it is done or under way."""
        return (
            self.is_done(sequence)
            or sequence in self._uncovered
            or sequence in self.waiting
            or sequence in self._placed
        )

    def unsaved_on(self, node_id: str) -> list[work_pb2.WorkOutcome]:
        """Trained ones of this node that no checkpoint contains."""
        return [outcome for outcome in self._uncovered.values() if outcome.node_id == node_id]

    def first_missing(self) -> int:
        """The first that is neither done nor under way."""
        sequence = self._record.next_sequence
        while self.is_known(sequence):
            sequence += 1
        return sequence

    def node_to_save(self) -> str | None:
        """Node whose checkpoint the next offers wait for: the window is full and begins with what only it has.

        Told once for each such micro-batch; None: none, or it was told.
        """
        first = self._record.next_sequence
        known = (self._ahead, self._counted, self._uncovered, self.waiting, self._placed)
        num_known = sum(map(len, known))
        if num_known < WINDOW or first not in self._uncovered or first == self._asked_for:
            return None
        self._asked_for = first
        return self._uncovered[first].node_id

    def add_to(self, job: types_pb2.TrainingJob) -> None:
        """Add to a copy of the record's job what the record does not count yet."""
        for outcomes in (self._ahead, self._uncovered):
            for sequence in sorted(outcomes):
                _add_progress(job, outcomes[sequence])
        job.unsaved_microbatches = len(self._uncovered)
        for node_id, _ in {(outcome.node_id, outcome.training.weight_step) for outcome in self._uncovered.values()}:
            job.steps_per_node[node_id] += 1

    def done_ahead(self, *, ended: bool) -> list[int]:
        """What a stored record counts beyond `next_sequence`; the record of an ended job counts all there is."""
        return sorted(self._counted.union(self._ahead, self._uncovered) if ended else self._counted)

    # ------------------------------------------------------------- offering

    def take_offer(self, num_available: int) -> int | None:
        """The next one to give to the core, of so many that there are; None: none now."""
        while self._released:
            sequence = heapq.heappop(self._released)
            if not self.is_known(sequence):
                return sequence
        while self._next_offer < min(num_available, self._record.next_sequence + WINDOW):
            sequence = self._next_offer
            self._next_offer += 1
            if not self.is_known(sequence):
                return sequence
        return None

    def may_have_run(self, sequence: int) -> bool:
        """Whether a predecessor of this scheduler may have offered it: ask the ledger before offering."""
        return sequence < self._known_until

    def held(self, sequence: int, *, waiting: bool) -> None:
        """The core has it, with or without a node."""
        self._uncovered.pop(sequence, None)
        if sequence == self._asked_for:
            self._asked_for = None  # who trains it now was not asked
        (self.waiting if waiting else self._placed).add(sequence)
        (self._placed if waiting else self.waiting).discard(sequence)

    def release(self, sequence: int) -> None:
        """The core does not have it any more; it is offered again."""
        self.forget(sequence)
        if sequence < self._next_offer:
            heapq.heappush(self._released, sequence)

    def forget(self, sequence: int) -> None:
        """The core does not have it any more."""
        self.waiting.discard(sequence)
        self._placed.discard(sequence)

    def forget_all(self) -> None:
        """The core has none any more."""
        self.waiting.clear()
        self._placed.clear()

    # ------------------------------------------------------------- progress

    def trained_unsaved(self, outcome: work_pb2.WorkOutcome) -> None:
        """One was trained, and no checkpoint contains it."""
        self._uncovered[outcome.training.sequence] = outcome

    def pop_unsaved(self, sequence: int) -> bool:
        """A checkpoint contains it now. False: it was not known to be trained."""
        return self._uncovered.pop(sequence, None) is not None

    def done(self, outcome: work_pb2.WorkOutcome) -> None:
        """One is done for good: the record's progress goes as far as there is no gap."""
        self._ahead[outcome.training.sequence] = outcome
        while (first := self._record.next_sequence) in self._ahead or first in self._counted:
            if first in self._ahead:
                _add_progress(self._record.job, self._ahead.pop(first))
            self._counted.discard(first)
            self._record.next_sequence += 1

    def reopen(self) -> None:
        """The job goes on after its end: its record counts everything done."""
        self._counted = set(self._record.done_ahead)
        self._ahead.clear()
        self._uncovered.clear()
        self._released.clear()
        self._next_offer = self._known_until = self._record.next_sequence
        self._asked_for = None


def _add_progress(job: types_pb2.TrainingJob, outcome: work_pb2.WorkOutcome) -> None:
    training = outcome.training
    if training.skipped:
        job.skipped_microbatches += 1
        return
    job.trained_microbatches += 1
    job.trained_tokens += training.label_tokens
    if training.HasField("loss"):
        job.last_loss = training.loss
