"""One training job as it runs: what was offered, what came back, what happened."""

import asyncio
import heapq
import math
from collections import deque
from collections.abc import Iterable
from itertools import takewhile

from lemix.errors import LemixError
from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.ledger.types import MAX_JOB_EVENTS
from services.runtime.clock import Clock

_ENDED = frozenset({types_pb2.JOB_STATUS_SUCCEEDED, types_pb2.JOB_STATUS_FAILED, types_pb2.JOB_STATUS_CANCELLED})
#: Held-out losses remembered.
_MAX_LOSSES = 100
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
        #: Outcomes beyond that.
        self._ahead: dict[int, work_pb2.WorkOutcome] = {}
        #: Trained, and in no checkpoint of their node yet: they may come back to be trained again.
        self._uncovered: dict[int, work_pb2.WorkOutcome] = {}
        #: The first of them for which its node was asked to save because the window is full.
        self._asked_for: int | None = None
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
        num_known = len(self._ahead) + len(self._uncovered) + len(self.waiting) + len(self._placed)
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
        if self.ended:
            record.job.CopyFrom(self.view())
        return record

    # ------------------------------------------------------------- offering

    def take_offer(self) -> int | None:
        """The next micro-batch to give to the core; None: none now."""
        if self.ended:
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
            or sequence in self._uncovered
            or sequence in self.waiting
            or sequence in self._placed
        )

    def _forget(self, sequence: int) -> None:
        self.waiting.discard(sequence)
        self._placed.discard(sequence)

    # ------------------------------------------------------------- progress

    def trained_unsaved(self, outcome: work_pb2.WorkOutcome) -> bool:
        """A micro-batch was trained, and no checkpoint of its node contains it yet. False when that was known."""
        sequence = outcome.training.sequence
        self._forget(sequence)
        if sequence < self._record.next_sequence or sequence in self._ahead or sequence in self._uncovered:
            return False
        self._begin()
        self._uncovered[sequence] = outcome
        self._note_trained(outcome)
        return True

    def trained(self, outcome: work_pb2.WorkOutcome) -> bool:
        """A micro-batch was trained, for good. False when that was known."""
        sequence = outcome.training.sequence
        self._forget(sequence)
        if sequence < self._record.next_sequence or sequence in self._ahead:
            return False
        self._begin()
        self._count_step(outcome)
        was_noted = self._uncovered.pop(sequence, None) is not None
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
        if sequence < self._record.next_sequence or sequence in self._ahead:
            return False
        self._begin()
        self._record.skipped_in_row += 1
        self._advance(sequence, outcome)
        row = f"{self._record.skipped_in_row} of {self.hyperparameters.max_skipped_in_row} in a row"
        self.add_event("warn", f"skipped micro-batch {sequence} ({row}): {outcome.training.error.message}")
        return True

    def _advance(self, sequence: int, outcome: work_pb2.WorkOutcome) -> None:
        self._ahead[sequence] = outcome
        while (done := self._ahead.pop(self._record.next_sequence, None)) is not None:
            _add_progress(self._record.job, done)
            self._record.next_sequence += 1

    def _begin(self) -> None:
        if self.status == types_pb2.JOB_STATUS_QUEUED:
            self._record.job.status = types_pb2.JOB_STATUS_RUNNING

    def _note_trained(self, outcome: work_pb2.WorkOutcome) -> None:
        self._record.skipped_in_row = 0
        loss = outcome.training.loss if outcome.training.HasField("loss") else None
        self._newest_loss = loss if loss is not None else self._newest_loss
        of_total = f" of {self.total_microbatches}" if self.total_microbatches else ""
        self.add_event("info", f"trained {self.num_trained}{of_total} micro-batches", loss=loss)

    def node_away(self, node_id: str, wait_s: float, checkpoint_id: str = "") -> None:
        """A node is lost, and waited for so long; 0: no longer. checkpoint_id: the newest one it held."""
        self._last_steps.pop(node_id, None)
        count = sum(outcome.node_id == node_id for outcome in self._uncovered.values())
        if wait_s:
            again = f"{count} micro-batches since its newest checkpoint are trained again"
            self.add_event("warn", f"{node_id} was lost: {again}, by itself if it is back within {wait_s:g} s")
        elif count or node_id in self._record.job.steps_per_node:
            again = f"other nodes train {count} micro-batches again"
            lost = f"their weights lack what checkpoint {checkpoint_id} contains, unless it was synchronised"
            lost = lost if checkpoint_id else "it held no checkpoint"
            self.add_event("error", f"{node_id} did not come back: {again}; {lost}")

    def _count_step(self, outcome: work_pb2.WorkOutcome) -> None:
        """Micro-batches of one optimizer step carry the same weights step."""
        step = outcome.training.weight_step
        if self._last_steps.get(outcome.node_id) != step:
            self._last_steps[outcome.node_id] = step
            self._record.job.steps_per_node[outcome.node_id] += 1

    # ------------------------------------------------------------- held-out loss

    def judge(self, node_id: str, checkpoint_id: str, loss: float) -> str:
        """Take over the loss of a node's checkpoint on the held-out examples, nats per token: "best" of all nodes so
        far, "good" or "bad".
        """
        losses, job = self._record.heldout_losses, self._record.job
        best = self._best_loss()
        while len(losses) >= _MAX_LOSSES:
            del losses[max(losses, key=lambda name: losses[name])]
        losses[checkpoint_id] = loss if math.isfinite(loss) else math.inf
        job.heldout_loss = loss
        if self.is_bad(checkpoint_id):
            self._record.bad_evaluations[node_id] += 1
            return "bad"
        self._record.bad_evaluations.pop(node_id, None)
        if loss >= best:
            return "good"
        job.best_heldout_loss, job.best_checkpoint_id = loss, checkpoint_id
        return "best"

    def is_bad(self, checkpoint_id: str) -> bool:
        """Whether this checkpoint must not be published."""
        loss = self.heldout_loss_of(checkpoint_id)
        if loss is None:
            return False
        return not math.isfinite(loss) or loss > self._best_loss() + self.quality_gate.tolerance

    def _best_loss(self) -> float:
        return min(self._record.heldout_losses.values(), default=math.inf)

    def heldout_loss_of(self, checkpoint_id: str) -> float | None:
        """What was measured for a checkpoint."""
        return self._record.heldout_losses.get(checkpoint_id)

    def is_to_go_back(self, node_id: str) -> bool:
        """Whether enough evaluations of this node in a row were bad."""
        return 0 < self.quality_gate.max_bad_evaluations <= self._record.bad_evaluations.get(node_id, 0)

    def best_of(self, checkpoint_ids: Iterable[str]) -> str | None:
        """The one with the smallest finite loss; None when none of them has one."""
        losses = self._record.heldout_losses
        known = [name for name in checkpoint_ids if math.isfinite(losses.get(name, math.inf))]
        return min(known, key=lambda name: losses[name], default=None)

    def went_back(self, node_id: str) -> None:
        """This node trains on from an earlier checkpoint."""
        self._record.bad_evaluations.pop(node_id, None)

    def unserve(self) -> bool:
        """Its model is not served any more. False when it was not."""
        if not self._record.job.served_model:
            return False
        self._record.job.served_model = ""
        self.dirty = True
        return True

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
