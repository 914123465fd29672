"""One training job as it runs: where it stands, and what its owner is told of it."""

from lemix.errors import LemixError
from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.runtime.clock import Clock
from services.scheduler.heldout import HeldOutLosses
from services.scheduler.job_events import JobEvents
from services.scheduler.job_facts import JobFacts
from services.scheduler.microbatches import Microbatches


class JobState(JobFacts):
    """No I/O."""

    def __init__(self, record: work_pb2.JobRecord, clock: Clock, *, resumed: bool = False) -> None:
        """resumed: a predecessor of this scheduler may have offered micro-batches already."""
        own = work_pb2.JobRecord()
        own.CopyFrom(record)
        super().__init__(own)
        self._clock = clock
        #: What was measured on its held-out examples.
        self.heldout = HeldOutLosses(own)
        self.microbatches = Microbatches(own, resumed=resumed)
        self.events = JobEvents()
        self._num_available = record.job.total_microbatches
        #: Paused, and the nodes have not been asked to save what they trained.
        self._owes_save = False
        self._last_steps: dict[str, int] = {}
        self._newest_loss: float | None = None
        #: Whether the ledger does not hold the newest progress.
        self.dirty = False

    # ------------------------------------------------------------- where it stands

    @property
    def num_trained(self) -> int:
        """Micro-batches trained."""
        return self.microbatches.num_done - self.microbatches.num_skipped

    @property
    def skipped_too_often(self) -> bool:
        """Whether as many were skipped in a row as the job bears."""
        return self._record.skipped_in_row >= self.hyperparameters.max_skipped_in_row

    @property
    def backlog(self) -> int:
        """Micro-batches not trained that could be."""
        return self._num_available - self.microbatches.num_done

    @property
    def complete(self) -> bool:
        """Whether everything was trained, and saved where nodes keep checkpoints."""
        return self.only_to_save and not self.microbatches.num_unsaved

    @property
    def only_to_save(self) -> bool:
        """Whether everything was trained."""
        return not self.endless and self.microbatches.num_done >= self.total_microbatches

    def view(self) -> types_pb2.TrainingJob:
        """What the owner sees now."""
        job = types_pb2.TrainingJob()
        job.CopyFrom(self._record.job)
        self.microbatches.add_to(job)
        if self._newest_loss is not None:
            job.last_loss = self._newest_loss
        return job

    def durable_record(self) -> work_pb2.JobRecord:
        """What to store; an ended job keeps all its progress."""
        record = work_pb2.JobRecord()
        record.CopyFrom(self._record)
        if self.ended:
            record.job.CopyFrom(self.view())
        record.ClearField("done_ahead")
        record.done_ahead.extend(self.microbatches.done_ahead(ended=self.ended))
        return record

    # ------------------------------------------------------------- offering

    def take_offer(self) -> int | None:
        """The next micro-batch to give to the core; None: none now."""
        return None if self.ended or self.paused else self.microbatches.take_offer(self._num_available)

    def held(self, sequence: int, *, waiting: bool) -> None:
        """The core has a micro-batch, with or without a node."""
        self.microbatches.held(sequence, waiting=waiting)
        if not waiting and self.status == types_pb2.JOB_STATUS_QUEUED:
            self._record.job.status = types_pb2.JOB_STATUS_RUNNING
            self.add_event("info", "the job has started")

    def grow(self, num_examples: int) -> None:
        """Feedback has come: the job has this many examples, one per micro-batch."""
        self._record.job.num_examples = max(num_examples, self._record.job.num_examples)
        self._num_available = self._record.job.num_examples
        self.dirty = True

    # ------------------------------------------------------------- progress

    def trained_unsaved(self, outcome: work_pb2.WorkOutcome) -> bool:
        """A micro-batch was trained, and no checkpoint of its node contains it yet. False when that was known."""
        sequence = outcome.training.sequence
        self.microbatches.forget(sequence)
        if self.microbatches.is_done(sequence) or self.microbatches.is_unsaved(sequence):
            return False
        self._begin()
        self._note_fresh(outcome)
        self.microbatches.trained_unsaved(outcome)
        self._note_trained(outcome)
        return True

    def trained(self, outcome: work_pb2.WorkOutcome) -> bool:
        """A micro-batch was trained, for good. False when that was known."""
        sequence = outcome.training.sequence
        self.microbatches.forget(sequence)
        if self.microbatches.is_done(sequence):
            return False
        self._begin()
        was_noted = self.microbatches.pop_unsaved(sequence)
        if not was_noted:
            self._note_fresh(outcome)
        self._count_step(outcome)
        self.microbatches.done(outcome)
        if was_noted:
            self.dirty = True
            self.events.wake_watchers()
        else:
            self._note_trained(outcome)
        return True

    def skipped(self, outcome: work_pb2.WorkOutcome) -> bool:
        """A micro-batch's loss or gradient was not finite: it counts as done. False when that was known."""
        sequence = outcome.training.sequence
        self.microbatches.forget(sequence)
        if self.microbatches.is_done(sequence):
            return False
        self._begin()
        self._record.skipped_in_row += 1
        self.microbatches.done(outcome)
        row = f"{self._record.skipped_in_row} of {self.hyperparameters.max_skipped_in_row} in a row"
        self.add_event("warn", f"skipped micro-batch {sequence} ({row}): {outcome.training.error.message}")
        return True

    def _begin(self) -> None:
        if self.status == types_pb2.JOB_STATUS_QUEUED:
            self._record.job.status = types_pb2.JOB_STATUS_RUNNING

    def _note_fresh(self, outcome: work_pb2.WorkOutcome) -> None:
        """Say so when a node that trained this job before had to begin with a new optimizer state."""
        node_id = outcome.node_id
        has_trained = {*self._record.job.steps_per_node, *self.microbatches.unsaved_nodes}
        if outcome.training.fresh_optimizer and node_id in has_trained:
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
        count = len(self.microbatches.unsaved_on(node_id))
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

    def is_wanted(self, task_id: str, sequence: int) -> bool:
        """Whether to train this micro-batch. One from before the job's end only if it counts as trained and comes back
        with a lost node: the weights of others lack it."""
        return task_id == self.task_id(sequence) or self.microbatches.is_done(sequence)

    def pause(self) -> None:
        """Offer nothing until `go_on`."""
        self._record.job.status = types_pb2.JOB_STATUS_PAUSED
        self._owes_save = True
        self.add_event("info", "the job was paused")

    def nodes_to_save_paused(self) -> set[str]:
        """Nodes that hold what no checkpoint contains, told once when a paused job has nothing under way any more."""
        if not (self.paused and self._owes_save) or self.microbatches.under_way:
            return set()
        self._owes_save = False
        return self.microbatches.unsaved_nodes

    def go_on(self) -> None:
        """Offer again, after a pause or after an end other than success."""
        before = types_pb2.JobStatus.Name(self.status).removeprefix("JOB_STATUS_").lower()
        if self.ended:
            self._reopen()
        begun = self.microbatches.begun
        self._record.job.status = types_pb2.JOB_STATUS_RUNNING if begun else types_pb2.JOB_STATUS_QUEUED
        self.add_event("info", f"the job was {before}; it goes on with micro-batch {self.microbatches.first_missing()}")

    def _reopen(self) -> None:
        self._record.CopyFrom(self.durable_record())
        self._record.attempt += 1
        self._record.skipped_in_row = 0
        self._record.job.ClearField("error")
        self._record.job.ClearField("finished_unix_s")
        self.microbatches.reopen()

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
        self.microbatches.forget_all()
        self.add_event(level, message)

    # ------------------------------------------------------------- told

    def add_event(self, level: str, message: str, *, loss: float | None = None) -> None:
        """Note that something happened and wake watchers."""
        self.dirty = True
        self.events.add(
            types_pb2.JobEvent(
                created_unix_s=self._clock.unix_s(),
                level=level,
                message=message,
                loss=loss,
                trained_microbatches=self.num_trained,
            )
        )
