"""When a checkpoint is due: after so many steps, after so long, when no more may be held back, or after a failure."""

from dataclasses import dataclass

from lemix.internal.v1 import work_pb2
from services.node_agent.checkpoint_coverage import MAX_JOBS

#: Pause after a checkpoint that could not be saved, seconds.
_RETRY_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointLimits:
    """When checkpoints are due. every_steps 0, every_s 0: not for that reason.

    max_unsaved: micro-batches held back; with so many no further one is started. give_up_s: after failing for so long,
    what is held back is finished without a checkpoint.
    """

    every_steps: int
    every_s: float
    max_unsaved: int
    give_up_s: float


@dataclass(slots=True)
class _Job:
    """Steps of a job since the newest checkpoint."""

    every_steps: int
    every_s: float
    steps: int = 0
    last_step: int = -1
    since_s: float | None = None


class CheckpointSchedule:
    """Counts the steps of every job and the attempts that failed. All times are monotonic, seconds."""

    def __init__(self, limits: CheckpointLimits) -> None:
        self._limits = limits
        self._jobs: dict[str, _Job] = {}
        self._failing_since_s: float | None = None
        self._retry_s = 0.0
        #: Why there should be a checkpoint that could not be saved; None: there is none such.
        self._owed: str | None = None

    @property
    def reason(self) -> str:
        """Why the next one is saved."""
        return self._owed or "interval"

    def is_full(self, num_unsaved: int) -> bool:
        """Whether, with so many held back, no further micro-batch may be started before a checkpoint."""
        return num_unsaved >= self._limits.max_unsaved

    def expect(self, work: work_pb2.TrainingWork) -> None:
        """A micro-batch of this job is here."""
        given = work.checkpoint
        every_steps = given.every_steps if given.HasField("every_steps") else self._limits.every_steps
        every_s = given.every_s if given.HasField("every_s") else self._limits.every_s
        job = self._jobs.setdefault(work.job_id, _Job(every_steps, every_s))
        job.every_steps, job.every_s = every_steps, every_s

    def trained(self, job_id: str, weight_step: int, now_s: float) -> None:
        """A micro-batch of this optimizer step is held back."""
        job = self._jobs.setdefault(job_id, _Job(self._limits.every_steps, self._limits.every_s))
        if weight_step != job.last_step:
            job.last_step = weight_step
            job.steps += 1
        if job.since_s is None:
            job.since_s = now_s

    def wait_s(self, now_s: float, num_unsaved: int) -> float | None:
        """How long until a checkpoint is due; None: nothing waits for one."""
        if not num_unsaved and self._owed is None:
            return None
        due_s = min((self._due_s(job, now_s) for job in self._jobs.values() if job.steps), default=float("inf"))
        if self.is_full(num_unsaved) or self._owed is not None:
            due_s = now_s
        due_s = max(due_s, self._retry_s)
        return None if due_s == float("inf") else max(0.0, due_s - now_s)

    def _due_s(self, job: _Job, now_s: float) -> float:
        if 0 < job.every_steps <= job.steps:
            return now_s
        return job.since_s + job.every_s if job.every_s and job.since_s is not None else float("inf")

    def failed(self, reason: str, now_s: float) -> bool:
        """It is tried again after a pause. True: it has failed for so long that nothing should wait for it."""
        self._retry_s, self._owed = now_s + _RETRY_S, reason
        self._failing_since_s = self._failing_since_s or now_s
        return now_s - self._failing_since_s >= self._limits.give_up_s

    def begin_anew(self, unsaved_jobs: set[str], now_s: float) -> None:
        """Nothing is owed any more. unsaved_jobs: those of which some micro-batch is still held back."""
        self._failing_since_s, self._retry_s, self._owed = None, 0.0, None
        for job_id, job in self._jobs.items():
            job.steps, job.since_s = (1, now_s) if job_id in unsaved_jobs else (0, None)
        self._jobs = dict(list(self._jobs.items())[-MAX_JOBS:])
