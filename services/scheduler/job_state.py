"""One training job as it runs: what was offered, what came back, what happened."""

import asyncio
import heapq
from collections import deque
from collections.abc import Iterable
from itertools import takewhile

from lemix.errors import LemixError
from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.ledger.types import MAX_JOB_EVENTS
from services.runtime.clock import Clock
from services.scheduler.heldout import HeldOutLosses

_ENDED = frozenset({types_pb2.JOB_STATUS_SUCCEEDED, types_pb2.JOB_STATUS_FAILED, types_pb2.JOB_STATUS_CANCELLED})
#: Micro-batches between the first untrained one and the newest offered: bounds memory, and the search after a restart.
WINDOW = 1024


class JobState:
    """No I/O. Sequences count micro-batches from 0."""

    def __init__(self, record: work_pb2.JobRecord, clock: Clock, *, resumed: bool = False) -> None:
        """resumed: a predecessor of this scheduler may have offered micro-batches already."""
        self._clock = clock
        #: As stored: progress up to `next_sequence`, the first micro-batch not trained.
        self._record = work_pb2.JobRecord()
        self._record.CopyFrom(record)
        #: What was measured on its held-out examples.
        self.heldout = HeldOutLosses(self._record)
        #: Outcomes beyond that.
        self._ahead: dict[int, work_pb2.WorkOutcome] = {}
        #: Done beyond that before the job ended and went on: the record counts them.
        self._counted = set(record.done_ahead)
        #: Trained, and in no checkpoint of their node yet: they may come back to be trained again.
        self._uncovered: dict[int, work_pb2.WorkOutcome] = {}
        #: The first of them for which its node was asked to save because the window is full.
        self._asked_for: int | None = None
        #: Paused, and the nodes have not been asked to save what they trained.
        self._owes_save = False
        #: Micro-batches in the core: without a node, and on one.
        self.waiting: set[int] = set()
        self._placed: set[int] = set()
        self._released: list[int] = []
        self._next_offer = record.next_sequence
        self._known_until = record.next_sequence + WINDOW if resumed else record.next_sequence
        self._num_available = record.job.total_microbatches
        self._last_steps: dict[str, int] = {}
        self._newest_loss: float | None = None
        self._events: deque[types_pb2.JobEvent] = deque(maxlen=MAX_JOB_EVENTS)
        self._unsaved: deque[types_pb2.JobEvent] = deque(maxlen=MAX_JOB_EVENTS)
        #: Set once when anything a watcher sees has changed; then replaced by a new one.
        self.changed = asyncio.Event()
        #: Whether the ledger does not hold the newest progress.
        self.dirty = False

    # ------------------------------------------------------------- what it is

    @property
    def job_id(self) -> str:
        """Id of the job."""
        return self._record.job.job_id

    @property
    def status(self) -> types_pb2.JobStatus:
        """State now."""
        return self._record.job.status

    @property
    def ended(self) -> bool:
        """Whether nothing more will run."""
        return self.status in _ENDED

    @property
    def paused(self) -> bool:
        """Whether its owner holds it."""
        return self.status == types_pb2.JOB_STATUS_PAUSED

    @property
    def endless(self) -> bool:
        """Whether it trains feedback as it comes."""
        return not self._record.job.training_file

    @property
    def file_id(self) -> str:
        """File with its examples."""
        return self._record.job.training_file or f"file-{self.job_id}"

    @property
    def num_examples(self) -> int:
        """Examples in the file."""
        return self._record.job.num_examples

    @property
    def lora(self) -> types_pb2.Lora | None:
        """The adapter it trains; None: it trains the weights themselves."""
        return self._record.job.lora if self._record.job.HasField("lora") else None

    @property
    def is_isolated(self) -> bool:
        """Whether its adapter serves only requests that name it."""
        return self._record.job.mode == types_pb2.TRAINING_MODE_ISOLATED

    @property
    def hyperparameters(self) -> types_pb2.Hyperparameters:
        """In force, defaults filled in."""
        return self._record.job.hyperparameters

    @property
    def checkpoint(self) -> types_pb2.CheckpointPolicy:
        """When nodes save checkpoints for it."""
        return self._record.job.checkpoint

    @property
    def validation_file(self) -> str:
        """File with its held-out examples; empty: none."""
        return self._record.job.validation_file

    @property
    def quality_gate(self) -> types_pb2.QualityGate:
        """What is done with the loss on them, defaults filled in."""
        return self._record.job.quality_gate

    @property
    def total_microbatches(self) -> int:
        """Of the whole job; 0 without an end."""
        return self._record.job.total_microbatches

    @property
    def num_trained(self) -> int:
        """Micro-batches trained."""
        return self._num_done - self.num_skipped

    @property
    def num_skipped(self) -> int:
        """Micro-batches whose loss or gradient was not finite."""
        ahead = sum(outcome.training.skipped for outcome in self._ahead.values())
        return self._record.job.skipped_microbatches + ahead

    @property
    def skipped_too_often(self) -> bool:
        """Whether as many were skipped in a row as the job bears."""
        return self._record.skipped_in_row >= self.hyperparameters.max_skipped_in_row

    @property
    def _num_done(self) -> int:
        job = self._record.job
        return job.trained_microbatches + job.skipped_microbatches + len(self._ahead) + len(self._uncovered)

    @property
    def unsaved_nodes(self) -> set[str]:
        """Nodes with micro-batches that no checkpoint contains."""
        return {outcome.node_id for outcome in self._uncovered.values()}

    def is_unsaved(self, sequence: int) -> bool:
        """Whether it was trained, and no checkpoint contains it."""
        return sequence in self._uncovered

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

    @property
    def backlog(self) -> int:
        """Micro-batches not trained that could be."""
        return self._num_available - self._num_done

    @property
    def complete(self) -> bool:
        """Whether everything was trained, and saved where nodes keep checkpoints."""
        return self.only_to_save and not self._uncovered

    @property
    def only_to_save(self) -> bool:
        """Whether everything was trained."""
        return not self.endless and self._num_done >= self.total_microbatches

    def view(self) -> types_pb2.TrainingJob:
        """What the owner sees now."""
        job = types_pb2.TrainingJob()
        job.CopyFrom(self._record.job)
        for sequence in sorted(self._ahead):
            _add_progress(job, self._ahead[sequence])
        for sequence in sorted(self._uncovered):
            _add_progress(job, self._uncovered[sequence])
        job.unsaved_microbatches = len(self._uncovered)
        for node_id, _ in {(outcome.node_id, outcome.training.weight_step) for outcome in self._uncovered.values()}:
            job.steps_per_node[node_id] += 1
        if self._newest_loss is not None:
            job.last_loss = self._newest_loss
        return job

    def durable_record(self) -> work_pb2.JobRecord:
        """What to store; an ended job keeps all its progress."""
        record = work_pb2.JobRecord()
        record.CopyFrom(self._record)
        done_ahead = set(self._counted)
        if self.ended:
            record.job.CopyFrom(self.view())
            done_ahead.update(self._ahead, self._uncovered)
        record.ClearField("done_ahead")
        record.done_ahead.extend(sorted(done_ahead))
        return record

    # ------------------------------------------------------------- offering

    def take_offer(self) -> int | None:
        """The next micro-batch to give to the core; None: none now."""
        if self.ended or self.paused:
            return None
        while self._released:
            sequence = heapq.heappop(self._released)
            if not self._is_known(sequence):
                return sequence
        while self._next_offer < min(self._num_available, self._record.next_sequence + WINDOW):
            sequence = self._next_offer
            self._next_offer += 1
            if not self._is_known(sequence):
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
        if not waiting and self.status == types_pb2.JOB_STATUS_QUEUED:
            self._record.job.status = types_pb2.JOB_STATUS_RUNNING
            self.add_event("info", "the job has started")

    def release(self, sequence: int) -> None:
        """The core does not have it any more; it is offered again."""
        self._forget(sequence)
        if sequence < self._next_offer:
            heapq.heappush(self._released, sequence)

    def grow(self, num_examples: int) -> None:
        """Feedback has come: the job has this many examples, one per micro-batch."""
        self._record.job.num_examples = max(num_examples, self._record.job.num_examples)
        self._num_available = self._record.job.num_examples
        self.dirty = True

    def _is_known(self, sequence: int) -> bool:
        return (
            sequence < self._record.next_sequence
            or sequence in self._ahead
            or sequence in self._counted
            or sequence in self._uncovered
            or sequence in self.waiting
            or sequence in self._placed
        )

    def _is_done(self, sequence: int) -> bool:
        """Whether it is trained for good, or skipped."""
        return sequence < self._record.next_sequence or sequence in self._ahead or sequence in self._counted

    def _forget(self, sequence: int) -> None:
        self.waiting.discard(sequence)
        self._placed.discard(sequence)

    # ------------------------------------------------------------- progress

    def trained_unsaved(self, outcome: work_pb2.WorkOutcome) -> bool:
        """A micro-batch was trained, and no checkpoint of its node contains it yet. False when that was known."""
        sequence = outcome.training.sequence
        self._forget(sequence)
        if self._is_done(sequence) or sequence in self._uncovered:
            return False
        self._begin()
        self._note_fresh(outcome)
        self._uncovered[sequence] = outcome
        self._note_trained(outcome)
        return True

    def trained(self, outcome: work_pb2.WorkOutcome) -> bool:
        """A micro-batch was trained, for good. False when that was known."""
        sequence = outcome.training.sequence
        self._forget(sequence)
        if self._is_done(sequence):
            return False
        self._begin()
        was_noted = self._uncovered.pop(sequence, None) is not None
        if not was_noted:
            self._note_fresh(outcome)
        self._count_step(outcome)
        self._advance(sequence, outcome)
        if was_noted:
            self.dirty = True
            self.wake_watchers()
        else:
            self._note_trained(outcome)
        return True

    def skipped(self, outcome: work_pb2.WorkOutcome) -> bool:
        """A micro-batch's loss or gradient was not finite: it counts as done. False when that was known."""
        sequence = outcome.training.sequence
        self._forget(sequence)
        if self._is_done(sequence):
            return False
        self._begin()
        self._record.skipped_in_row += 1
        self._advance(sequence, outcome)
        row = f"{self._record.skipped_in_row} of {self.hyperparameters.max_skipped_in_row} in a row"
        self.add_event("warn", f"skipped micro-batch {sequence} ({row}): {outcome.training.error.message}")
        return True

    def _advance(self, sequence: int, outcome: work_pb2.WorkOutcome) -> None:
        self._ahead[sequence] = outcome
        while (first := self._record.next_sequence) in self._ahead or first in self._counted:
            if first in self._ahead:
                _add_progress(self._record.job, self._ahead.pop(first))
            self._counted.discard(first)
            self._record.next_sequence += 1

    def _begin(self) -> None:
        if self.status == types_pb2.JOB_STATUS_QUEUED:
            self._record.job.status = types_pb2.JOB_STATUS_RUNNING

    def _note_fresh(self, outcome: work_pb2.WorkOutcome) -> None:
        """Say so when a node that trained this job before had to begin with a new optimizer state."""
        node_id = outcome.node_id
        if outcome.training.fresh_optimizer and node_id in {*self._record.job.steps_per_node, *self.unsaved_nodes}:
            lost = f"{node_id} no longer had the optimizer state of this job"
            self.add_event("warn", f"{lost}: it goes on with a fresh one, and its learning rate schedule begins anew")

    def _note_trained(self, outcome: work_pb2.WorkOutcome) -> None:
        self._record.skipped_in_row = 0
        loss = outcome.training.loss if outcome.training.HasField("loss") else None
        self._newest_loss = loss if loss is not None else self._newest_loss
        of_total = f" of {self.total_microbatches}" if self.total_microbatches else ""
        self.add_event("info", f"trained {self.num_trained}{of_total} micro-batches", loss=loss)

    def node_away(self, node_id: str, wait_s: float, checkpoint_id: str = "", failover: str = "") -> None:
        """A node is lost; wait_s as in `on_node_away`. checkpoint_id: its newest; failover: what became of it."""
        self._last_steps.pop(node_id, None)
        count = sum(outcome.node_id == node_id for outcome in self._uncovered.values())
        if wait_s:
            again = f"{count} micro-batches since its newest checkpoint are trained again"
            self.add_event("warn", f"{node_id} was lost: {again}, by itself if it is back within {wait_s:g} s")
        elif count or node_id in self._record.job.steps_per_node:
            again = f"other nodes train {count} micro-batches again"
            lack = f"their weights lack what checkpoint {checkpoint_id} contains, unless it was synchronised"
            lost = failover or (lack if checkpoint_id else "it held no checkpoint")
            self.add_event("error", f"{node_id} did not come back: {again}; {lost}")

    def _count_step(self, outcome: work_pb2.WorkOutcome) -> None:
        """Micro-batches of one optimizer step carry the same weights step."""
        step = outcome.training.weight_step
        if self._last_steps.get(outcome.node_id) != step:
            self._last_steps[outcome.node_id] = step
            self._record.job.steps_per_node[outcome.node_id] += 1

    def unserve(self) -> bool:
        """Its model is not served any more. False when it was not."""
        was_served = bool(self._record.job.served_model)
        self._record.job.served_model = ""
        self.dirty |= was_served
        return was_served

    # ------------------------------------------------------------- paused, and going on

    def task_id(self, sequence: int) -> str:
        """Id of a micro-batch. The ledger remembers ended ones: what goes on after the job's end has others."""
        return f"{self.job_id}/{sequence}/{self.attempt}" if self.attempt else f"{self.job_id}/{sequence}"

    @property
    def attempt(self) -> int:
        """How often it went on after it had ended."""
        return self._record.attempt

    def is_wanted(self, task_id: str, sequence: int) -> bool:
        """Whether to train this micro-batch. One from before the job's end only if it counts as trained and comes back
        with a lost node: the weights of others lack it."""
        return task_id == self.task_id(sequence) or self._is_done(sequence)

    def pause(self) -> None:
        """Offer nothing until `go_on`."""
        self._record.job.status = types_pb2.JOB_STATUS_PAUSED
        self._owes_save = True
        self.add_event("info", "the job was paused")

    def nodes_to_save_paused(self) -> set[str]:
        """Nodes that hold what no checkpoint contains, told once when a paused job has nothing under way any more."""
        if not (self.paused and self._owes_save) or self.waiting or self._placed:
            return set()
        self._owes_save = False
        return self.unsaved_nodes

    def go_on(self) -> None:
        """Offer again, after a pause or after an end other than success."""
        before = types_pb2.JobStatus.Name(self.status).removeprefix("JOB_STATUS_").lower()
        if self.ended:
            self._reopen()
        has_begun = self._num_done or self._placed
        self._record.job.status = types_pb2.JOB_STATUS_RUNNING if has_begun else types_pb2.JOB_STATUS_QUEUED
        self.add_event("info", f"the job was {before}; it goes on with micro-batch {self._first_missing()}")

    def _reopen(self) -> None:
        self._record.CopyFrom(self.durable_record())
        self._record.attempt += 1
        self._record.skipped_in_row = 0
        self._record.job.ClearField("error")
        self._record.job.ClearField("finished_unix_s")
        self._counted = set(self._record.done_ahead)
        self._ahead.clear()
        self._uncovered.clear()
        self._released.clear()
        self._next_offer = self._known_until = self._record.next_sequence
        self._asked_for = None

    def _first_missing(self) -> int:
        sequence = self._record.next_sequence
        while self._is_known(sequence):
            sequence += 1
        return sequence

    def serve_again(self, model: str) -> None:
        """Its isolated adapter, which was freed, is made anew."""
        self._record.job.served_model = model

    def set_error(self, error: LemixError) -> None:
        """Why it fails."""
        self._record.job.error.CopyFrom(error.to_proto())

    def end(self, status: types_pb2.JobStatus, level: str, message: str) -> None:
        """Nothing more will run."""
        self._record.job.status = status
        self._record.job.finished_unix_s = self._clock.unix_s()
        self.waiting.clear()
        self._placed.clear()
        self.add_event(level, message)

    # ------------------------------------------------------------- events

    def add_event(self, level: str, message: str, *, loss: float | None = None) -> None:
        """Note that something happened and wake watchers."""
        event = types_pb2.JobEvent(
            sequence=self._events[-1].sequence + 1 if self._events else 1,
            created_unix_s=self._clock.unix_s(),
            level=level,
            message=message,
            loss=loss,
            trained_microbatches=self.num_trained,
        )
        self._events.append(event)
        self._unsaved.append(event)
        self.dirty = True
        self.wake_watchers()

    def restore_events(self, events: Iterable[types_pb2.JobEvent]) -> None:
        """Take over a stored history. What a retry stored twice is taken once."""
        for event in events:
            if not self._events or event.sequence > self._events[-1].sequence:
                self._events.append(event)

    def events_after(self, sequence: int) -> list[types_pb2.JobEvent]:
        """Kept events with a larger sequence, oldest first."""
        newest_first = takewhile(lambda event: event.sequence > sequence, reversed(self._events))
        return list(newest_first)[::-1]

    def unsaved_events(self) -> list[types_pb2.JobEvent]:
        """Events that the ledger does not hold."""
        return list(self._unsaved)

    def events_saved(self, count: int) -> None:
        """The oldest unsaved events are stored now."""
        for _ in range(min(count, len(self._unsaved))):
            self._unsaved.popleft()

    def wake_watchers(self) -> None:
        """Let everyone who waits for a change look again."""
        self.changed.set()
        self.changed = asyncio.Event()


def _add_progress(job: types_pb2.TrainingJob, outcome: work_pb2.WorkOutcome) -> None:
    training = outcome.training
    if training.skipped:
        job.skipped_microbatches += 1
        return
    job.trained_microbatches += 1
    job.trained_tokens += training.label_tokens
    if training.HasField("loss"):
        job.last_loss = training.loss
