"""What the driver tells training jobs of their micro-batches."""

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import work_pb2
from services.scheduler import metrics
from services.scheduler.checkpoints import CheckpointDesk
from services.scheduler.core.events import Event
from services.scheduler.job_lifecycle import JobLifecycle
from services.scheduler.job_state import JobState
from services.scheduler.jobs import JobRegistry


class JobProgress:
    """The driver's `TrainingJobs`."""

    def __init__(self, *, jobs: JobRegistry, lifecycle: JobLifecycle, checkpoints: CheckpointDesk) -> None:
        self._jobs = jobs
        self._lifecycle = lifecycle
        self._checkpoints = checkpoints

    def is_wanted(self, item: work_pb2.WorkItem) -> bool:
        """Whether this micro-batch is to be trained: its job has not ended since."""
        state = self._jobs.running_job(item.training.job_id)
        return state is not None and state.is_wanted(item.task_id, item.training.sequence)

    def on_held(self, work: work_pb2.TrainingWork, *, waiting: bool) -> None:
        """The core holds this micro-batch."""
        state = self._jobs.running_job(work.job_id)
        if state is not None:
            state.held(work.sequence, waiting=waiting)
            self._jobs.fed.set()

    def on_refused(self, work: work_pb2.TrainingWork, error: LemixError) -> list[Event]:
        """The core refused this micro-batch: for now, or for good."""
        state = self._jobs.running_job(work.job_id)
        if state is None:
            return []
        state.microbatches.release(work.sequence)
        # Too many wait: it is offered again after the next change, not in a loop.
        return [] if error.code is ErrorCode.OVERLOADED else self._lifecycle.fail_now(state, error)

    def on_taken_back(self, item: work_pb2.WorkItem) -> None:
        """The core gave it back because its job is paused; by now it may go on."""
        state = self._jobs.running_job(item.training.job_id)
        if state is not None:
            state.microbatches.release(item.training.sequence)
            self._checkpoints.ask_to_save(state)
            self._jobs.changed()

    def on_outcome(self, outcome: work_pb2.WorkOutcome) -> list[Event]:
        """A micro-batch ended. May come twice."""
        training = outcome.training
        state = self._jobs.running_job(training.job_id)
        if state is None:
            return []
        if training.HasField("error") and outcome.task_id != state.task_id(training.sequence):
            return []  # it was cancelled with the job, which goes on since
        if training.skipped:
            return self._skipped(state, outcome)
        if training.HasField("error"):
            return self._lifecycle.fail_now(state, LemixError.from_proto(training.error))
        is_saved_now = state.microbatches.is_unsaved(training.sequence)
        if state.trained(outcome):
            metrics.TRAINED.inc()
            if state.complete:
                return self._lifecycle.succeed(state)
            if not is_saved_now or state.paused:  # else the rest of its checkpoint follows
                self._checkpoints.ask_to_save(state)
            self._jobs.changed()
        return []

    def _skipped(self, state: JobState, outcome: work_pb2.WorkOutcome) -> list[Event]:
        if not state.skipped(outcome):
            return []
        metrics.SKIPPED.inc()
        if state.skipped_too_often:
            error = LemixError.from_proto(outcome.training.error)
            most = state.hyperparameters.max_skipped_in_row
            message = f"{most} micro-batches in a row were skipped, the last because: {error.message}"
            return self._lifecycle.fail_now(state, LemixError(error.code, message))
        if state.complete:
            return self._lifecycle.succeed(state)
        self._checkpoints.ask_to_save(state)
        self._jobs.changed()
        return []

    def on_trained(self, outcome: work_pb2.WorkOutcome) -> None:
        """A micro-batch was trained and is in no checkpoint yet. May come twice."""
        state = self._jobs.running_job(outcome.training.job_id)
        if state is None:
            return
        if state.trained_unsaved(outcome):
            self._checkpoints.ask_to_save(state)
            self._jobs.changed()

    def unsaved_on(self, node_id: str) -> list[work_pb2.WorkOutcome]:
        """What this node trained and is in no checkpoint, as far as it was told."""
        return [outcome for state in self._jobs.running() for outcome in state.microbatches.unsaved_on(node_id)]

    def on_node_away(self, node_id: str, wait_s: float, failover: str = "") -> None:
        """A node is lost; see `driver_ports.TrainingJobs`."""
        for state in self._jobs.running():
            if node_id in state.microbatches.unsaved_nodes or node_id in state.view().steps_per_node:
                state.node_away(node_id, wait_s, self._checkpoints.newest_of_lost(node_id), failover)
        self._jobs.changed()
